"""The version of this library: known where it is used from its sources, without being installed, as well."""

VERSION = "0.1.0"
