"""Training scripts of the zoo: `python -m gratis.zoo.train.NAME` trains NAME anew, with its seed, and says how it did."""
