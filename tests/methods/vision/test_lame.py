from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import parametrize_with_checks

import gratis
from gratis.contract.errors import InputError, ParameterError
from gratis.methods.vision import lame
from gratis.methods.vision.lame import LAMEClassifier, nearest
from gratis.subjects.streams import batches, in_runs, order_of, prior_shift
from gratis.subjects.vision import group_classes, read_features
from tests.tiny_vision import tiny_features


def reference(p, f, affinity="knn", k=5, weight=1.0, symmetric=False, steps=100, tolerance=1e-8):
    """The algorithm with loops, in float64."""
    p, f = np.asarray(p, float), np.asarray(f, float)
    n = len(p)
    f = f / np.sqrt((f**2).sum(1, keepdims=True))
    d = np.array([[np.sqrt(((f[i] - f[j]) ** 2).sum()) for j in range(n)] for i in range(n)])
    w = np.zeros((n, n))
    if affinity == "knn":
        for i in range(n):
            for j in np.argsort(d[i], kind="stable")[: min(k + 1, n)][1:]:
                w[i, j] = 1
    elif affinity == "rbf":
        sigma = np.mean([np.sort(d[i])[min(k, n) - 1] for i in range(n)])
        w = np.exp(-(d**2) / (2 * sigma**2))
    else:
        w = f @ f.T
    if symmetric:
        w = (w + w.T) / 2
    u = -np.log(p + 1e-10)
    y = np.exp(-u) / np.exp(-u).sum(1, keepdims=True)
    energy = []
    for t in range(steps):
        pairwise = weight * w @ y
        z = -u + pairwise
        y = np.exp(z - z.max(1, keepdims=True))
        y /= y.sum(1, keepdims=True)
        energy.append((u * y - pairwise * y + y * np.log(np.maximum(y, 1e-20))).sum())
        if t > 1 and abs(energy[-1] - energy[-2]) <= tolerance * abs(energy[-2]):
            break
    return y, energy


@pytest.mark.parametrize("affinity", ["knn", "rbf", "linear"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("k", [2, 5, 40])
def test_against_a_float64_loop(affinity, symmetric, k):
    p, f = tiny_features()
    expected, energy = reference(p, f, affinity, k, 1.0, symmetric)
    out = gratis.LAME(affinity=affinity, neighbors=k, symmetric=symmetric).adapt(p, f)
    np.testing.assert_allclose(out.probabilities, expected, atol=1e-9)
    np.testing.assert_allclose(out.energy, energy, rtol=1e-9)
    assert out.iterations == len(energy)
    assert (out.labels == expected.argmax(1)).all()


def test_weight_zero_is_the_classifier():
    p, f = tiny_features()
    out = gratis.LAME(weight=0).adapt(p, f)
    np.testing.assert_array_equal(out.probabilities, p)
    assert out.changed == 0


def test_the_point_itself_is_no_neighbour_and_the_graph_is_directed():
    f = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.3]]), dim=1)
    assert nearest(f, 1).tolist() == [[1], [0], [1]]
    assert nearest(f, 9).shape == (3, 2)


def test_one_sample_has_no_neighbours():
    p, f = tiny_features()
    np.testing.assert_allclose(gratis.LAME().adapt(p[:1], f[:1]).probabilities, p[:1], atol=1e-9)


def test_features_are_normalised():
    p, f = tiny_features()
    scaled = f * np.random.default_rng(0).uniform(0.1, 10, (len(f), 1))
    a, b = gratis.LAME().adapt(p, f), gratis.LAME().adapt(p, scaled)
    np.testing.assert_allclose(a.probabilities, b.probabilities, atol=1e-9)


def test_bound_never_rises_with_a_positive_semidefinite_affinity():
    for seed in range(5):
        energy = gratis.LAME(affinity="rbf").adapt(*tiny_features(seed)).energy
        assert (np.diff(energy) <= 1e-9).all()


def test_permuting_samples_and_classes():
    p, f = tiny_features()
    out = gratis.LAME().adapt(p, f).probabilities
    order = np.random.default_rng(0).permutation(len(p))
    np.testing.assert_allclose(gratis.LAME().adapt(p[order], f[order]).probabilities, out[order], atol=1e-9)
    np.testing.assert_allclose(gratis.LAME().adapt(p[:, [2, 0, 1]], f).probabilities, out[:, [2, 0, 1]], atol=1e-9)


@pytest.mark.parametrize("affinity", ["knn", "rbf", "linear"])
def test_identical_samples_get_identical_rows(affinity):
    p, f = tiny_features()
    p, f = np.concatenate([p, p[:1]]), np.concatenate([f, f[:1]])
    out = gratis.LAME(affinity=affinity).adapt(p, f).probabilities
    np.testing.assert_allclose(out[0], out[-1], atol=1e-12)


@pytest.mark.parametrize("seed", [1, 2])
def test_the_local_minimum_is_that_of_projected_gradient_descent(seed):
    p, f = (a[[0, 1, 8, 9, 16]] for a in tiny_features(seed))
    p = p[:, :2] / p[:, :2].sum(1, keepdims=True)
    out = gratis.LAME(affinity="rbf", neighbors=3, max_iterations=5000, tolerance=1e-15).adapt(p, f)
    g = f / np.linalg.norm(f, axis=1, keepdims=True)
    d = np.linalg.norm(g[:, None] - g[None], axis=2)
    sigma = np.sort(d, axis=1)[:, 2].mean()
    w = np.exp(-(d**2) / (2 * sigma**2))
    u = -np.log(p + 1e-10)

    def objective(y):
        return (y * u).sum() + (y * np.log(np.maximum(y, 1e-300))).sum() - (w * (y @ y.T)).sum() / 2

    a = p[:, 0].copy()
    for _ in range(40000):
        y = np.stack([a, 1 - a], 1)
        gradient = u + np.log(np.maximum(y, 1e-300)) + 1 - w @ y
        a = np.clip(a - 0.01 * (gradient[:, 0] - gradient[:, 1]), 1e-12, 1 - 1e-12)
    assert objective(out.probabilities) == pytest.approx(objective(np.stack([a, 1 - a], 1)), abs=1e-6)


def test_a_class_of_probability_zero_can_win():
    f = np.ones((12, 2)) + 0.01 * np.random.default_rng(0).standard_normal((12, 2))
    p = np.tile([0.0, 1.0], (12, 1))
    p[0] = [1.0, 0.0]
    assert gratis.LAME(neighbors=11, weight=1.0).adapt(p, f).labels[0] == 0
    assert gratis.LAME(neighbors=11, weight=5.0).adapt(p, f).labels[0] == 1


def test_identical_points_are_neighbours_of_one_another_never_of_themselves():
    f = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), dim=1)
    index = nearest(f, 2)
    assert [sorted(row) for row in index.tolist()[:3]] == [[1, 2], [0, 2], [0, 1]]
    assert 3 not in index[3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["spread", "near copies"])
def test_neighbours_of_a_large_batch_are_those_of_the_full_distance_matrix(dtype, kind, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(400, 24, generator=generator, dtype=dtype)
    if kind == "near copies":
        f = f[:4].repeat(100, 1) + 1e-4 * f
    f = torch.nn.functional.normalize(f, dim=1)
    distance = torch.cdist(f, f, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    expected = distance.sort(dim=1, stable=True).values[:, :5]
    for block in (lame.BLOCK, 5000):
        monkeypatch.setattr(lame, "BLOCK", block)
        index = nearest(f, 5)
        assert (index != torch.arange(400)[:, None]).all()
        torch.testing.assert_close(distance.gather(1, index), expected, rtol=0, atol=0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_sparse_path_is_the_dense_product(symmetric):
    p, f = tiny_features()
    f = np.concatenate([f] * 8) + 0.1 * np.random.default_rng(0).standard_normal((192, 6))
    p = np.concatenate([p] * 8)
    out = gratis.LAME(symmetric=symmetric).adapt(p, f).probabilities
    np.testing.assert_allclose(out, reference(p, f, symmetric=symmetric)[0], atol=1e-9)


def test_at_most_so_many_updates():
    out = gratis.LAME(max_iterations=3).adapt(*tiny_features())
    assert out.iterations == 3
    assert not out.converged
    assert len(gratis.LAME(tolerance=1e9).adapt(*tiny_features()).energy) == 3  # the stop is asked from the third on


def test_the_wider_of_two_dtypes_is_kept_and_arrays_may_be_read_only():
    p, f = tiny_features()
    assert gratis.LAME().adapt(p.astype(np.float32), f.astype(np.float32)).probabilities.dtype == np.float32
    assert gratis.LAME().adapt(p.astype(np.float32), f).probabilities.dtype == np.float64
    expected = gratis.LAME().adapt(p, f).probabilities
    p.flags.writeable = f.flags.writeable = False
    np.testing.assert_array_equal(gratis.LAME().adapt(p, f).probabilities, expected)
    np.testing.assert_array_equal(gratis.LAME().adapt(p.tolist(), f[::-1][::-1]).probabilities, expected)
    with pytest.raises(InputError, match="must be numbers"):
        gratis.LAME().adapt(p.astype(str), f)


def test_tiny_and_huge_features_have_a_direction():
    p, f = tiny_features()
    expected = gratis.LAME().adapt(p, f).labels
    for scale in (1e-200, 1e200):
        np.testing.assert_array_equal(gratis.LAME().adapt(p, f * scale).labels, expected)


def test_superclasses_are_summed_and_renormalised_before():
    p = np.array([[0.2, 0.3, 0.1, 0.4]])
    np.testing.assert_allclose(group_classes(p, [[0, 1], [2]]), [[5 / 6, 1 / 6]])
    np.testing.assert_allclose(group_classes(torch.from_numpy(p), [[0, 1], [2]]).numpy(), [[5 / 6, 1 / 6]])
    with pytest.raises(InputError, match="at least one class"):
        group_classes(p, [[0], []])
    with pytest.raises(InputError, match="does not have"):
        group_classes(p, [[0], [4]])
    with pytest.raises(InputError, match="no probability"):
        group_classes(np.array([[1.0, 0, 0]]), [[1], [2]])


def test_nothing_is_carried_from_batch_to_batch():
    method = gratis.LAME()
    first = method.adapt(*tiny_features(0)).probabilities
    method.adapt(*tiny_features(1))
    np.testing.assert_array_equal(method.adapt(*tiny_features(0)).probabilities, first)


def test_torch_in_torch_out_and_half_is_raised():
    p, f = (torch.from_numpy(a) for a in tiny_features())
    out = gratis.LAME().adapt(p.half() / p.half().sum(1, keepdim=True), f.half())
    assert isinstance(out.probabilities, torch.Tensor)
    assert out.probabilities.dtype == torch.float32
    logits = gratis.LAME().adapt(p.log(), f, logits=True)
    torch.testing.assert_close(logits.probabilities, gratis.LAME().adapt(p, f).probabilities)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, f: (p * 2, f), "sum to 1"),
        (lambda p, f: (-p, f), "non-negative"),
        (lambda p, f: (p * np.nan, f), "not finite"),
        (lambda p, f: (p, f * np.inf), "not finite"),
        (lambda p, f: (p, np.where(np.arange(24)[:, None] == 4, 0, f)), "row 4 are all zero"),
        (lambda p, f: (p[:5], f), "5 rows of probabilities but 24"),
        (lambda p, f: (p[:, :1], f), "two classes"),
        (lambda p, f: (p, f[:, :, None, None]), "average pooled maps"),
        (lambda p, f: (p[:0], f[:0]), "empty"),
    ],
)
def test_unusable_input_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        gratis.LAME().adapt(*change(*tiny_features()))


def test_a_gaussian_without_width_is_refused():
    with pytest.raises(ParameterError, match="at least 2"):
        gratis.LAME(affinity="rbf", neighbors=1)
    with pytest.raises(InputError, match="no width"):
        gratis.LAME(affinity="rbf").adapt(np.full((6, 2), 0.5), np.ones((6, 3)))


def test_dense_affinities_warn_on_large_batches():
    p, f = (np.tile(a, (2, 1)) for a in tiny_features())
    with pytest.warns(UserWarning, match="collapse"):
        gratis.LAME(affinity="linear").adapt(p, f + 1e-3 * np.random.default_rng(0).standard_normal(f.shape))


def test_guard_leaves_predictions_alone_where_neighbours_do_not_agree():
    p, f = tiny_features()
    noise = np.random.default_rng(0).standard_normal(f.shape)
    alone = gratis.LAME(guard=True).adapt(p, noise)
    assert alone.guarded
    assert alone.iterations == 0
    np.testing.assert_array_equal(alone.probabilities, p)
    adapted = gratis.LAME(guard=True).adapt(p, f)
    assert not adapted.guarded
    assert adapted.agreement > alone.agreement
    np.testing.assert_array_equal(adapted.probabilities, gratis.LAME().adapt(p, f).probabilities)


def test_guard_leaves_batches_alone_that_hold_too_few_of_a_class():
    p = np.repeat(0.7 * np.eye(3) + 0.1, 4, axis=0)
    f = np.repeat(np.eye(3), 4, axis=0) + 0.1 * np.random.default_rng(0).standard_normal((12, 3))
    assert not gratis.LAME(neighbors=3, guard=True).adapt(p, f).guarded
    assert not gratis.LAME(neighbors=6, guard=True).adapt(p, f).guarded
    assert gratis.LAME(neighbors=7, guard=True).adapt(p, f).guarded  # 3 of 7 at most can be of the sample's class


def test_guard_does_not_ask_a_batch_of_one_class_to_agree_above_chance():
    generator = np.random.default_rng(0)
    f = np.array([3.0, 0, 0, 0]) + generator.standard_normal((16, 4))
    p = generator.dirichlet([6.0, 3, 1, 1], 16)
    assert not gratis.LAME(guard=True).adapt(p, f).guarded


def test_agreement_is_that_of_the_neighbours_labels():
    p, f = tiny_features()
    index = nearest(torch.nn.functional.normalize(torch.from_numpy(f), dim=1), 5).numpy()
    labels = p.argmax(1)
    assert gratis.LAME().adapt(p, f).agreement == pytest.approx(np.mean(labels[index] == labels[:, None]))
    assert gratis.LAME().adapt(p[:1], f[:1]).agreement is None
    assert gratis.LAME(affinity="linear").adapt(p, f).agreement is None


def test_reading_features_leaves_the_model_as_it_was():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(144, 5)
    )
    model.train()
    model[2].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    logits, features = read_features(model, "3", torch.randn(4, 3, 8, 8))
    assert logits.shape == (4, 5)
    assert features.shape == (4, 144)
    assert [m.training for m in model] == [True, True, False, True]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model[3]._forward_pre_hooks
    with pytest.raises(TypeError, match="no layer 'head'"):
        read_features(model, "head", torch.randn(1, 3, 8, 8))


class Broken(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(3, 2)

    def forward(self, x):
        self.fc(x)
        raise RuntimeError("broken")


class Twice(Broken):
    def forward(self, x):
        return self.fc(x) + self.fc(x)


class Named(Broken):
    def forward(self, x):
        from types import SimpleNamespace

        return SimpleNamespace(logits=self.fc(input=x))


def test_reading_features_of_models_of_other_makes():
    broken = Broken().train()
    with pytest.raises(RuntimeError, match="broken"):
        read_features(broken, "fc", torch.randn(2, 3))
    assert broken.training
    assert not broken.fc._forward_pre_hooks
    with pytest.raises(TypeError, match="2 times"):
        read_features(Twice(), "fc", torch.randn(2, 3))
    x = torch.randn(5, 3)
    model = Named()
    logits, features = read_features(model, "fc", x, batch_size=2)
    torch.testing.assert_close(features, x)
    torch.testing.assert_close(logits, model.fc(x).detach())
    maps = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 2, 2), torch.nn.Flatten())
    images = torch.randn(5, 3, 2, 2)
    with pytest.raises(TypeError, match="pooling='mean'"):
        read_features(maps, "1", images)
    _, pooled = read_features(maps, "1", images, pooling="mean")
    torch.testing.assert_close(pooled, maps[0](images).mean((2, 3)).detach())


def test_a_stream_through_a_torch_classifier():
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(20, 4) + 2 * torch.eye(4)[torch.arange(20) // 5]
    groups = [[0, 2], [1, 3]]
    stream = gratis.LAME().adapt_stream(model, images.split(8), layer="3", groups=groups)
    out = [next(stream)]
    assert model.training
    out += list(stream)
    assert [len(adapted.labels) for adapted in out] == [8, 8, 4]
    logits, features = read_features(model, "3", images[:8])
    expected = gratis.LAME().adapt(group_classes(logits.softmax(1), groups), features)
    torch.testing.assert_close(out[0].probabilities, expected.probabilities)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["ViT", "ResNet", "Dinov2"])
def test_a_stream_through_classifiers_of_transformers(name):
    import transformers

    sizes = {
        "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    }.get(
        name, {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    )
    config = getattr(transformers, f"{name}Config")(num_labels=5, **sizes)
    model = getattr(transformers, f"{name}ForImageClassification")(config).train()
    images = torch.randn(10, 3, 32, 32)
    first, last = gratis.LAME().adapt_stream(model, images.split(8), layer="classifier")
    assert first.probabilities.shape == (8, 5)
    assert last.probabilities.shape == (2, 5)
    assert model.training
    plain, _ = gratis.LAME(weight=0.0).adapt_stream(model, images.split(8), layer="classifier")
    with torch.no_grad():
        torch.testing.assert_close(plain.probabilities, model.eval()(images[:8]).logits.softmax(1))


def test_streams_follow_their_rules():
    labels = np.repeat(np.arange(20), 50)
    runs = in_runs(labels, np.random.default_rng(0))
    assert sorted(runs.tolist()) == list(range(1000))
    seen = labels[runs]
    assert (np.diff(seen) != 0).sum() == 19
    first = labels[np.random.default_rng(0).permutation(1000)]
    assert list(dict.fromkeys(seen)) == list(dict.fromkeys(first))
    for seed in range(5):
        drawn = labels[prior_shift(labels, np.random.default_rng(seed))]
        counts = np.sort(np.bincount(drawn, minlength=20))[::-1]
        assert counts[:2].sum() < 0.9 * 1000
        assert len(drawn) > 900
    with pytest.raises(InputError, match="share must be above"):
        prior_shift(labels, np.random.default_rng(0), share=0.1)
    with pytest.raises(InputError, match="draws"):
        prior_shift(labels, np.random.default_rng(0), share=0.1001)
    with pytest.raises(InputError, match="two classes"):
        prior_shift(labels * 0, np.random.default_rng(0))
    both = order_of(labels, np.random.default_rng(0), runs=True, shifted=True)
    assert (np.diff(labels[both]) != 0).sum() == len(np.unique(labels[both])) - 1
    assert len(np.unique(both)) < len(both)
    assert [len(part) for part in batches(both[:37], 16)] == [16, 16, 5]
    again = prior_shift(labels, np.random.default_rng(3))
    np.testing.assert_array_equal(again, prior_shift(labels, np.random.default_rng(3)))
    assert len(np.unique(again)) < len(again)


def test_scikit_learn_reads_and_clones_the_parameters():
    method = gratis.LAME(neighbors=7)
    assert clone(method) == method
    assert clone(method) is not method
    assert method.set_params(neighbors=2).neighbors == 2
    with pytest.raises(ParameterError):
        method.set_params(neighbors=0)
    assert method.neighbors == 2


NOT_FOR_LAME = {
    "check_methods_subset_invariance": "predictions of a batch depend on one another: that is the method",
    "check_methods_sample_order_invariance": "rows are adapted batch by batch in their order: that is the method",
}


@parametrize_with_checks([LAMEClassifier()], expected_failed_checks=lambda estimator: NOT_FOR_LAME)
def test_scikit_learn_checks(estimator, check):
    check(estimator)


def test_searches_of_scikit_learn_reach_the_parameters_of_the_method():
    generator = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], 20)
    x = generator.standard_normal((60, 4)) + 1.2 * np.eye(4)[y]
    search = GridSearchCV(LAMEClassifier(method=gratis.LAME()), {"method__neighbors": [1, 3]}, cv=2).fit(x, y)
    assert search.best_params_["method__neighbors"] in (1, 3)
    assert search.best_estimator_.method.neighbors == search.best_params_["method__neighbors"]


def test_a_trained_classifier_is_used_as_it_is():
    generator = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], 20)
    x = generator.standard_normal((60, 4)) + np.eye(4)[y]
    trained = LogisticRegression().fit(x, y)
    model = LAMEClassifier(FrozenEstimator(trained), gratis.LAME(weight=0.0)).fit(x[:6], [0, 1, 2, 0, 1, 2])
    np.testing.assert_array_equal(model.predict_proba(x), trained.predict_proba(x))


def test_a_row_without_direction_keeps_its_prediction_and_is_no_neighbour():
    generator = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], 20)
    x = generator.standard_normal((60, 4)) + np.eye(4)[y]
    model = LAMEClassifier(batch_size=61).fit(x, y)
    with_zero = np.insert(x, 7, 0.0, axis=0)
    p = model.predict_proba(with_zero)
    np.testing.assert_array_equal(p[7], model.classifier_.predict_proba(np.zeros((1, 4)))[0])
    np.testing.assert_allclose(np.delete(p, 7, axis=0), model.predict_proba(x))


@pytest.mark.parametrize("size", [0, -1, 1.5, "16"])
def test_a_batch_size_that_is_none_is_refused(size):
    with pytest.raises((TypeError, ValueError), match="batch_size"):
        LAMEClassifier(batch_size=size).fit(np.eye(4), [0, 1, 0, 1])


def test_classifier_adapts_batch_by_batch():
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((60, 4)), np.repeat([0, 1, 2], 20)
    x += 1.2 * np.eye(4)[y]
    model = LAMEClassifier(LogisticRegression(), gratis.LAME(neighbors=3), batch_size=20).fit(x, y)
    noisy = x + generator.standard_normal(x.shape)
    expected = [
        gratis.LAME(neighbors=3).adapt(model.classifier_.predict_proba(noisy[i : i + 20]), noisy[i : i + 20]).labels
        for i in (0, 20, 40)
    ]
    np.testing.assert_array_equal(model.predict(noisy), np.concatenate(expected))
