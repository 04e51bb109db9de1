"""zsad_lib.methods.dzad: the readings on made-up measurements, the pass over the images on tiny networks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from compvis import fill
from tiny import IDS, SMALL, guided_model, made_up, tiny_guided

from zsad_lib.anomaly.features import load_features
from zsad_lib.diffusion import guidance
from zsad_lib.diffusion.guidance import GuidedModel, SemanticGuide
from zsad_lib.diffusion.latent import load_backbone
from zsad_lib.errors import MethodError, ModelError
from zsad_lib.evaluation import metrics, tables
from zsad_lib.methods import dzad
from zsad_lib.methods.dzad import DZAD, Reading, join


def tiny_dzad(backbone, **options):
    return DZAD(backbone=backbone, features=load_features("pixels"), **SMALL, **options)


# --- readings


def test_weight_one_is_the_plain_mean():
    measured = made_up()
    reading = Reading("one", decision="weighted sum", map="noise errors", sigma=0)
    scores, maps = reading.read(measured)
    assert scores == pytest.approx(measured.errors.errors.mean((1, 2, 3)), rel=1e-6)
    assert maps.shape == (6, 8, 8)
    np.testing.assert_array_equal(reading.read(replace(measured, similarity=None))[1], maps)
    small = torch.nn.functional.interpolate(torch.from_numpy(maps)[:, None], (4, 4), mode="area")[:, 0]
    assert small.mean((1, 2)).numpy() == pytest.approx(scores, rel=0.05)


def test_class_features_decide_by_the_nearest_matrix():
    """Eq. 12, against a loop; the decision is right on errors that differ."""
    measured, reference = made_up(seed=1), made_up(seed=2)
    scores, _ = Reading("one", map="features").read(measured, reference)
    for image, score in zip(measured.errors.matrix, scores, strict=True):
        distance = [np.sqrt(((image - known) ** 2).mean()) for known in reference.errors.matrix]
        normal, anomalous = (min(np.array(distance)[reference.labels == label]) for label in (0, 1))
        assert score == pytest.approx(normal - anomalous, abs=1e-6)
    assert ((scores > 0) == measured.labels).all()
    distances, nearest = dzad.class_distances(reference.errors.matrix, reference.errors.matrix)
    assert distances == pytest.approx(0, abs=1e-6) and (nearest == np.arange(6)).all(), "each is its own nearest"


def test_the_threshold_parts_the_classes():
    labels = np.array([0, 0, 0, 1, 1])
    threshold = dzad.best_threshold(np.array([0.1, 0.4, 0.2, 0.5, 0.9]), labels)
    assert 0.4 < threshold <= 0.5


def test_branch_weights_pull_normal_images_and_push_anomalous_ones():
    error_maps = np.array([[[0.5, 1.0, 2.0, 9.0]], [[0.01, 1.0, 2.0, 9.0]]])
    judged = np.array([False, True])
    pulled, pushed = dzad.branch_weights(error_maps, np.ones(2), judged, factor=2)
    assert pulled.tolist() == [[2.0, 1.0, 1.0, 1.0]]
    assert pushed.tolist() == [[1.0, 1.0, 0.5, 0.5]]
    assert dzad.branch_weights(error_maps, np.ones(2), judged, "constant", 2).tolist() == [[[2.0] * 4], [[0.5] * 4]]


def test_two_branches_without_weights_are_the_plain_feature_map():
    """Errors at the level of the most similar normal image everywhere: w_pn = w_pa = 1."""
    measured = made_up(shift=0)
    measured.errors.maps[:] = measured.errors.errors[:] = 0.7
    branches, features = (Reading(map=name).read(measured, measured)[1] for name in ("two-branch", "features"))
    assert np.abs(branches - features).max() < 1e-5


def test_two_branches_find_what_is_anomalous():
    measured, reference = made_up(seed=1), made_up(seed=2)
    masks = np.zeros((6, 8, 8), bool)
    masks[measured.labels == 1, 2:4, 4:6] = True
    for name in dzad.MAPS:
        scores, maps = Reading(map=name, sigma=0).read(measured, reference)
        found = tables.evaluate(["a"] * 6, measured.labels, scores, maps, masks, n_bootstrap=0)
        found = found[found.category == "mean"].set_index("metric").value
        assert found["image_auroc"] == 1 and found["pixel_auroc"] > 0.99, name


def test_without_many_timesteps_one_cell_decides():
    measured = made_up()
    alone = Reading(multi_timestep=False, decision="weighted sum", map="noise errors")
    assert alone.read(measured)[0] == pytest.approx(measured.errors.errors[:, 2, 0, 0])
    changed = replace(measured.errors, errors=measured.errors.errors.copy())
    changed.errors[:, 4] += 9
    assert (alone.read(replace(measured, errors=changed))[0] == alone.read(measured)[0]).all()


def test_learned_weights_beat_one_on_the_set_they_were_fitted_on():
    reference = made_up(40, seed=3, shift=0.03)
    readings = (Reading(name, decision="weighted sum", map="features") for name in ("one", "learned"))
    one, learned = (metrics.auroc(reference.labels, r.read(reference, reference)[0]) for r in readings)
    assert learned > one


def test_the_maximum_of_the_map_needs_no_reference():
    measured = made_up()
    scores, maps = Reading(decision="map maximum", map="features", sigma=0, pool=1).read(measured)
    assert scores == pytest.approx(maps.max((1, 2)))


def test_parts_join_in_order():
    whole = made_up()
    again = join([whole.take(slice(0, 2)), whole.take(np.arange(6) >= 2)])
    assert (again.errors.ids == whole.errors.ids).all() and (again.similarity == whole.similarity).all()
    assert (again.labels == whole.labels).all()
    with pytest.raises(MethodError, match="share images"):
        join([whole, whole])


# --- the pass over the images


def test_it_costs_the_matrix_and_the_reconstruction():
    model, images = guided_model()
    scores = tiny_dzad(model, seeds=3).score(images, IDS, ["plate"] * 4)
    assert (scores.details["evaluations"] == 5 * 2 * 3 + 4).all()  # the last of 5 steps stays where it is
    assert scores.details["matrix"].shape == (4, 5, 2)


def test_a_new_guide_changes_nothing_and_a_trained_one_does():
    backbone, _ = tiny_guided()
    images = torch.rand(4, 3, 32, 32)
    new = SemanticGuide.from_unet(backbone.unet, 2)
    methods = [tiny_dzad(model) for model in (backbone, GuidedModel(backbone, new))]
    plain, guided = (m.measure(images, IDS) for m in methods)
    assert np.abs(plain.errors.errors - guided.errors.errors).max() < 1e-5
    fill("guide", new)
    assert np.abs(methods[1].measure(images, IDS).errors.errors - plain.errors.errors).max() > 1e-3


def test_the_reconstruction_starts_where_it_is_told():
    model, images = guided_model()
    with torch.no_grad():
        low, high = (tiny_dzad(model, t_start=t).reconstruct(images, IDS) for t in (250, None))
        decoded = model.backbone.decode(model.backbone.encode(images))
    assert (low - decoded).abs().mean() < (high - decoded).abs().mean()
    assert tiny_dzad(model, t_start=250).t_start == 201


def test_a_saved_model_gives_identical_output(saved, tmp_path):
    """The trained parts beside their base: what comes back predicts the same, to the last bit."""
    backbone = load_backbone(saved)
    guide = fill("guide", SemanticGuide.from_unet(backbone.unet, backbone.scale_factor.bit_length() - 1)).eval()
    with torch.no_grad():
        for parameter in backbone.unet.up_blocks.parameters():
            parameter.add_(0.1)
    facts = {"base": str(saved), "mode": "all", "timesteps": 1200, "schedule": "continued"}
    (tmp_path / "pair").mkdir()
    guidance.save_guided(tmp_path / "pair", backbone.unet, guide, facts)
    loaded = guidance.load_guided(tmp_path / "pair")
    z, images = torch.randn(2, *backbone.latent_shape), torch.rand(2, 3, backbone.image_size, backbone.image_size)
    with torch.no_grad():
        ours, theirs = (
            m.condition_on(images).predict_noise(z, 501, backbone.embed(["", ""]))
            for m in (GuidedModel(backbone, guide, "all"), loaded)
        )
    assert torch.equal(ours, theirs) and len(loaded.backbone.alphas_cumprod) == 1200 and loaded.mode == "all"
    assert isinstance(guidance.load_guided_or_plain(saved), type(backbone))
    random = guidance.load_guided_or_plain(tmp_path / "pair", random_weights="unet")
    assert random.backbone.control == "unet"
    with pytest.raises(ModelError, match="does not fit the U-Net"):
        guidance.load_guided(tmp_path / "pair", base="lite-group-a")


def test_references_that_cannot_work():
    measured = made_up()
    with pytest.raises(MethodError, match="only one class"):
        Reading().read(measured, measured.take(measured.labels == 0))
    with pytest.raises(MethodError, match="needs a reference"):
        Reading().read(measured)
    model, images = guided_model()
    for reading in ({"map": "two-branch"}, {"weighting": "learned"}, {"decision": "class features"}):
        with pytest.raises(MethodError, match="needs a reference"):
            tiny_dzad(model, **reading).score(images, IDS, IDS)
    with pytest.raises(MethodError, match="reconstruct=True"):
        Reading().read(replace(measured, similarity=None), measured)


def test_labelled_images_are_measured_once_and_named():
    """What `fit` is given passes the network at the first score alone; the record says what it was."""
    model, images = guided_model()
    asked, method = [], tiny_dzad(model)

    class Known:
        record = {"reference": "plates", "limit": 1}

        def batches(self, size):
            asked.append(size)
            yield images, IDS, [0, 0, 1, 1]

    assert method.config["reference"] is None and method.config["decision"] == "weighted sum"
    assert method.fit(Known()) is method and not asked
    assert method.config["reference"] == "plates" and method.config["decision"] == "class features"
    first, again = (method.score(images, IDS, IDS) for _ in range(2))
    assert asked == [32] and torch.equal(first.image, again.image)
    assert first.image[:2].max() <= 0 <= first.image[2:].min()  # each image is its own nearest
