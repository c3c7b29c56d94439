"""A frozen ImageNet classifier that meets corrupted photographs.

Its thousand classes are summed into the twelve of the task, as in the superclass scenarios of M. Boudiaf et al.,
"Parameter-free Online Test-time Adaptation", CVPR 2022. What the photographs show is plain to the eye: the labels are
not the classifier's.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal

from gratis.contract.errors import MissingExtraError
from gratis.contract.method import Method
from gratis.contract.parameters import param
from gratis.tasks.digits_stream import _pair, stream_measurement
from gratis.tasks.task import Measurement, Metric, Progress, Task, TaskCard, silent

SUPERCLASSES = {
    "cat": [281, 282, 283, 284, 285],
    "coffee": [504, 967, 968],
    "camera": [732, 759, 872],
    "motorcycle": [665, 670],
    "rocket": [657, 744, 812],
    "temple": [442, 497, 538, 663, 668, 698, 832],
    "dog": list(range(151, 269)),
    "bird": [*range(7, 25), *range(80, 101), *range(127, 147)],
    "car": [407, 436, 468, 511, 609, 627, 656, 661, 717, 751, 817],
    "aircraft": [404, 405, 895],
    "clock": [409, 530, 892],
    "flower": [984, 985, 986],
}
"""ImageNet classes of each class of the task."""

PHOTOGRAPHS = {
    "chelsea.png": "cat",
    "coffee.png": "coffee",
    "camera.png": "camera",
    "motorcycle_left.png": "motorcycle",
    "rocket.jpg": "rocket",
    "china.jpg": "temple",
}
"""Photographs that ship with scikit-image and scikit-learn, and what they show."""

CORRUPTIONS = ("noise", "blur", "contrast", "darkness", "glare", "jpeg")
SIZE = 224


class ImageStream(Task):
    """Crops of photographs under corruptions, one photograph after the other, under a prior shift, or shuffled."""

    card = TaskCard(
        title="Corrupted photographs in a stream",
        acts_on="features",
        data=(
            "random crops of six photographs that ship with scikit-image and scikit-learn (a cat, coffee, a camera on a "
            "tripod, a motorcycle, a rocket, a temple), each under noise, blur, low contrast, darkness, glare or JPEG "
            "compression, before EfficientNet-Lite0 with ImageNet weights, whose classes are summed into these six and "
            "six that never come (dog, bird, car, aircraft, clock, flower)"
        ),
        metrics=(Metric(name="accuracy", help="share of crops that get the class of what their photograph shows"),),
        warm_up={"crops": 1},
    )

    crops: int = param(24, above=0, help="crops per photograph")
    stream: Literal["runs", "iid", "prior-shift", "runs-prior-shift", "corruptions"] = param(
        "runs",
        help="in runs of one photograph or of one corruption, or shuffled, and whether photographs are imbalanced",
    )
    severity: float = param(0.8, at_least=0, at_most=1, help="strength of the corruptions; 0 is none")
    batch_size: int = param(16, above=0, help="crops that are adapted together")

    def subject(self) -> Any:
        from gratis.subjects.vision import imagenet_backbone

        return imagenet_backbone()

    def applied(self, subject: Any, method: Method | None) -> AbstractContextManager[Any]:
        return _pair(subject, method)

    def measure(self, subject: Any, *, seed: int, progress: Progress = silent) -> Measurement:
        import numpy as np

        from gratis.subjects.streams import adapted_labels, order_of

        model, method = subject
        generator = np.random.default_rng(seed)
        p, features, truth, kind = self.predicted(model, generator, progress)
        order = order_of(
            kind if self.stream == "corruptions" else truth,
            generator,
            runs=self.stream.startswith(("runs", "corruptions")),
            shifted=self.stream.endswith("prior-shift"),
        )
        right = adapted_labels(method, p, features, order, self.batch_size) == truth[order]
        measurement = stream_measurement(right, self.batch_size, progress)
        measurement.details["accuracy by corruption"] = {
            name: float(right[kind[order] == k].mean()) for k, name in enumerate(CORRUPTIONS) if k in kind[order]
        }
        return measurement

    def predicted(self, model: Any, generator: Any, progress: Progress = silent) -> tuple[Any, Any, Any, Any]:
        """What `model` says of fresh crops, photograph by photograph, drawn with the NumPy `generator`.

        Arrays: probabilities (crops, 12), features (crops, 1280), true classes (crops,), numbers of the corruptions
        (crops,).
        """
        import numpy as np
        import torch

        from gratis.subjects.vision import group_classes, normalized, read_features

        names = list(SUPERCLASSES)
        logits, features, labels, kinds = [], [], [], []
        for number, (file, shows) in enumerate(PHOTOGRAPHS.items()):
            photograph = _photograph(file)
            drawn = generator.integers(len(CORRUPTIONS), size=self.crops)
            crops = [_corrupted(_crop(photograph, generator), CORRUPTIONS[k], self.severity, generator) for k in drawn]
            scores, vectors = read_features(model, "_fc", normalized(np.stack(crops)))
            logits.append(scores.double())
            features.append(vectors.double())
            labels += [names.index(shows)] * self.crops
            kinds += drawn.tolist()
            progress((number + 1) / (len(PHOTOGRAPHS) + 1), f"crops of {file}")
        p = group_classes(torch.softmax(torch.cat(logits), dim=1).numpy(), list(SUPERCLASSES.values()))
        return p, torch.cat(features).numpy(), np.asarray(labels), np.asarray(kinds)


def _photograph(name: str) -> Any:
    """(3, height, width) image in [0, 1]."""
    from pathlib import Path

    import numpy as np
    import sklearn

    try:
        import skimage
        from PIL import Image
    except ImportError:
        raise MissingExtraError.of("scikit-image", "vision") from None

    folders = (Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets" / "images")
    with Image.open(next(folder / name for folder in folders if (folder / name).is_file())) as image:
        return np.asarray(image.convert("RGB"), dtype=np.float32).transpose(2, 0, 1) / 255


def _resized(image: Any, size: int) -> Any:
    import torch

    tensor = torch.as_tensor(image)[None]
    return torch.nn.functional.interpolate(tensor, (size, size), mode="bilinear", antialias=True)[0].numpy()


def _crop(image: Any, generator: Any) -> Any:
    _, height, width = image.shape
    side = int(min(height, width) * generator.uniform(0.6, 0.95))
    top, left = generator.integers(0, height - side + 1), generator.integers(0, width - side + 1)
    return _resized(image[:, top : top + side, left : left + side], SIZE)


def _corrupted(image: Any, kind: str, severity: float, generator: Any) -> Any:
    """(3, height, width) image in [0, 1] under one of CORRUPTIONS; severity 0 leaves it as it is."""
    import io

    import numpy as np
    from PIL import Image
    from scipy.ndimage import gaussian_filter

    if severity == 0:
        return image
    if kind == "noise":
        image = image + 0.5 * severity * generator.standard_normal(image.shape)
    elif kind == "blur":
        image = gaussian_filter(image, (0, 6 * severity, 6 * severity))
    elif kind == "contrast":
        image = image.mean() + (image - image.mean()) * (1 - 0.95 * severity)
    elif kind == "darkness":
        image = image * (1 - 0.95 * severity)
    elif kind == "glare":
        image = image + 0.8 * severity
    else:
        file = io.BytesIO()
        pixels = np.round(np.clip(image, 0, 1).transpose(1, 2, 0) * 255).astype(np.uint8)
        Image.fromarray(pixels).save(file, "JPEG", quality=max(1, round(30 * (1 - severity))))
        with Image.open(file) as read:
            image = np.asarray(read, dtype=np.float32).transpose(2, 0, 1) / 255
    return np.clip(image, 0, 1).astype(np.float32)
