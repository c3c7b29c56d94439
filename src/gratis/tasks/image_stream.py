"""A frozen ImageNet classifier that meets corrupted photographs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal

from gratis.contract.method import Method
from gratis.contract.parameters import param
from gratis.tasks.digits_stream import _pair, stream_measurement
from gratis.tasks.task import Measurement, Metric, Progress, Task, TaskCard, silent

PHOTOGRAPHS = (
    "astronaut.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "hubble_deep_field.jpg",
    "motorcycle_left.png", "rocket.jpg", "china.jpg", "flower.jpg",
)  # fmt: skip
SIZE = 224


class ImageStream(Task):
    """Crops of photographs under corruptions; right is the class that the classifier gives the whole clean one."""

    card = TaskCard(
        title="Corrupted photographs in a stream",
        acts_on="features",
        data=(
            "random crops of ten photographs that ship with scikit-image and scikit-learn, under noise, blur, low "
            "contrast and darkness, before EfficientNet-Lite0 with ImageNet weights; the truth of a crop is the class "
            "of its whole clean photograph"
        ),
        metrics=(Metric(name="accuracy", help="share of crops that get the class of their photograph"),),
    )

    crops: int = param(16, above=0, help="crops per photograph")
    stream: Literal["runs", "iid", "prior-shift"] = param("runs", help="one photograph after the other, or shuffled")
    severity: float = param(0.6, at_least=0, at_most=1, help="strength of the corruptions")
    batch_size: int = param(16, above=0, help="crops that are adapted together")

    def subject(self) -> Any:
        from gratis.subjects.vision import imagenet_backbone

        return imagenet_backbone()

    def applied(self, subject: Any, method: Method | None) -> AbstractContextManager[Any]:
        return _pair(subject, method)

    def measure(self, subject: Any, *, seed: int, progress: Progress = silent) -> Measurement:
        import numpy as np
        import torch

        from gratis.subjects.streams import adapted_labels, in_runs, prior_shift, shuffled
        from gratis.subjects.vision import normalized, read_features

        model, method = subject
        generator = np.random.default_rng(seed)
        whole = _photographs()
        truth = read_features(model, "_fc", normalized(np.stack([_resized(p, SIZE) for p in whole])))[0].argmax(1)
        crops, groups = [], []
        for number, photograph in enumerate(whole):
            for _ in range(self.crops):
                crops.append(_corrupted(_crop(photograph, generator), self.severity, generator))
                groups.append(number)
            progress(0.3 * (number + 1) / len(whole), "cropping and corrupting photographs")
        logits, features = read_features(model, "_fc", normalized(np.stack(crops)))
        labels, of = truth.numpy()[groups], np.asarray(groups)
        order = {
            "runs": lambda: in_runs(of, generator),
            "iid": lambda: shuffled(len(of), generator),
            "prior-shift": lambda: prior_shift(of, generator),
        }[self.stream]()
        probabilities = torch.softmax(logits.double(), dim=1).numpy()
        right = (
            adapted_labels(method, probabilities, features.double().numpy(), order, self.batch_size) == labels[order]
        )
        return stream_measurement(right, self.batch_size, progress)


def _photographs() -> list[Any]:
    """(3, height, width) photographs in [0, 1]."""
    from pathlib import Path

    import numpy as np
    import skimage
    import sklearn
    from PIL import Image

    folders = (Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets" / "images")
    found = []
    for name in PHOTOGRAPHS:
        path = next(folder / name for folder in folders if (folder / name).is_file())
        with Image.open(path) as image:
            found.append(np.asarray(image.convert("RGB"), dtype=np.float32).transpose(2, 0, 1) / 255)
    return found


def _resized(image: Any, size: int) -> Any:
    import torch

    tensor = torch.as_tensor(image)[None]
    return torch.nn.functional.interpolate(tensor, (size, size), mode="bilinear", antialias=True)[0].numpy()


def _crop(image: Any, generator: Any) -> Any:
    _, height, width = image.shape
    side = int(min(height, width) * generator.uniform(0.6, 0.95))
    top, left = generator.integers(0, height - side + 1), generator.integers(0, width - side + 1)
    return _resized(image[:, top : top + side, left : left + side], SIZE)


def _corrupted(image: Any, severity: float, generator: Any) -> Any:
    import numpy as np
    from scipy.ndimage import gaussian_filter

    kind = generator.integers(4)
    if kind == 0:
        image = image + 0.5 * severity * generator.standard_normal(image.shape)
    elif kind == 1:
        image = gaussian_filter(image, (0, 6 * severity, 6 * severity))
    elif kind == 2:
        image = image.mean() + (image - image.mean()) * (1 - 0.9 * severity)
    else:
        image = image * (1 - 0.85 * severity)
    return np.clip(image, 0, 1).astype(np.float32)
