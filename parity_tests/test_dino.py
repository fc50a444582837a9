"""DINO's moving parts, and DINO beside vit-pytorch's and the official head, loss and crops."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import isovit
from isovit.backends import get_backend, model_class
from isovit.errors import InputError
from isovit.spec.config import Config
from isovit.spec.families import config as variant
from isovit.spec.families import param_tree
from isovit.spec.families.vit import ViTConfig
from isovit.spec.initialize import init, probe
from isovit.spec.objectives.dino import DINOConfig
from isovit.spec.param import STATISTICS
from isovit.weight_convert.formats import FORMATS, rename_table
from parity_tests.agreement import assert_agree, assert_outputs_agree
from parity_tests.examples import TRAINERS
from parity_tests.objectives.dino import HEAD, NET, NETS
from parity_tests.oracles import dino as official
from parity_tests.oracles.arrays import reference
from parity_tests.oracles.importing import import_oracle
from parity_tests.oracles.objectives.dino import Network
from parity_tests.strategies import Case
from parity_tests.subject import Subject
from parity_tests.test_foreign import randomised

Weights = dict[str, np.ndarray]

CASE, LOCAL = TRAINERS["dino_official"], TRAINERS["dino_local"]
DECAY, MOMENTUM = 0.75, 0.9
FIELDS = {name: getattr(CASE.config, name) for name in CASE.config.__struct_fields__}


# --- what moves -----------------------------------------------------------------------------------


def step(backend: Subject, case: Case, model: Any) -> np.ndarray:
    """The losses, then both updates, as a user writes them; there is no optimiser."""
    module = backend.module("objectives.dino")

    def run(model: Any, images: Any, teacher_images: Any, *local_images: Any) -> Any:
        teacher = model.project_teacher(teacher_images)
        losses = model.losses(model.project_student(images, *local_images), teacher)
        module.update_center(model, teacher, MOMENTUM)
        module.update_teacher(model, DECAY)
        return losses

    return backend.array(compiled(backend, run)(model, *inputs_of(backend, case)))


def inputs_of(backend: Subject, case: Case) -> list[Any]:
    """What a model is called with, in the order of its arguments."""
    return [backend.tensor(x) for x in (case.images, *case.others.values())]


def compiled(backend: Subject, run: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a model, compiled where every operation else is."""
    if backend.framework != "flax":
        return run
    from flax import nnx

    return nnx.jit(run)


def said_by_teacher(case: Case, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """(batch, teacher_views, out_dim), by the NumPy reference."""
    prefix = "teacher."
    inner = {p.removeprefix(prefix): a for p, a in weights.items() if p.startswith(prefix)}
    views = np.moveaxis(case.others["teacher_images"].astype(np.float64), 1, 0)
    return np.stack([Network(case.config, inner).output(view) for view in views], axis=1)


def stepped(case: Case, *, decay: float = DECAY, said: np.ndarray | None = None) -> Weights:
    """The weights behind one step, in NumPy."""
    weights = {path: array.astype(np.float64) for path, array in case.weights.items()}
    params = param_tree(case.config).parameters()
    said = said_by_teacher(case, weights) if said is None else said
    found = dict(weights)
    found["center"] = MOMENTUM * weights["center"] + (1 - MOMENTUM) * said.mean(axis=(0, 1))[None]
    for path, param in params.items():
        if param.source and params[param.source].trainable:
            found[path] = decay * weights[path] + (1 - decay) * weights[param.source]
    return found


MOVED = {
    "dino_official": CASE,
    "dino_pytorch": TRAINERS["dino_pytorch"],
    "dino_local": LOCAL,
    "dino_with_batch_norm": Case(
        DINOConfig(net=next(net for net in NETS if net.family == "levit"), **HEAD)
    ),
    "dino_with_random_features": Case(
        DINOConfig(net=next(net for net in NETS if net.family == "t2t_vit"), **HEAD)
    ),
}


@pytest.mark.parametrize("name", MOVED)
def test_a_step_moves_centre_and_teacher(backend: Subject, name: str) -> None:
    case = MOVED[name]
    model = backend.build(case)
    losses = step(backend, case, model)
    wanted = reference(case.config, case.weights, case.images, case.others)[""]
    assert_outputs_agree(losses, wanted)
    found = backend.runtime.read(model)
    assert_agree(found, stepped(case), "output")
    for path, param in param_tree(case.config).parameters().items():
        if not param.moves:  # the student, running statistics, random features: not one bit
            np.testing.assert_array_equal(found[path], case.weights[path], err_msg=path)


def test_a_step_that_is_another_is_seen(backend: Subject) -> None:
    """The average the wrong way round; the centre of what the student said, or of one view."""
    model = backend.build(CASE)
    step(backend, CASE, model)
    found, said = backend.runtime.read(model), said_by_teacher(CASE, CASE.weights)
    student = {p: a for p, a in CASE.weights.items() if p.startswith("student.")}
    swapped = {p.replace("student.", "teacher.", 1): a for p, a in student.items()}
    for wrong in (
        stepped(CASE, decay=1 - DECAY),
        stepped(CASE, said=said_by_teacher(CASE, {**CASE.weights, **swapped})),
        stepped(CASE, said=said[:, :1]),
        stepped(CASE, said=said[:1]),
    ):
        with pytest.raises(AssertionError, match="output beyond 1e-12"):
            assert_agree(found, wrong, "output")


def test_the_centre_moves_behind_the_loss(backend: Subject) -> None:
    """What it was before belongs to this loss, what it is then to the next."""
    model = backend.build(CASE)
    first, second = step(backend, CASE, model), step(backend, CASE, model)
    moved = stepped(CASE)
    assert_outputs_agree(second, reference(CASE.config, moved, CASE.images, CASE.others)[""])
    early = {**CASE.weights, "center": moved["center"]}
    with pytest.raises(AssertionError, match="output beyond 1e-12"):
        assert_outputs_agree(first, reference(CASE.config, early, CASE.images, CASE.others)[""])


def test_a_call_may_give_the_teachers_temperature(backend: Subject) -> None:
    """It is annealed while a model trains."""
    model = backend.build(CASE)
    run = compiled(backend, lambda model, *inputs: model(*inputs, teacher_temp=0.07))
    found = backend.array(run(model, *inputs_of(backend, CASE)))
    config = CASE.config.replace(teacher_temp=0.07)
    assert_outputs_agree(found, reference(config, CASE.weights, CASE.images, CASE.others)[""])


def trained(backend: Subject, case: Case) -> dict[str, np.ndarray]:
    """The losses in training mode, and every running statistic behind them."""
    model, by_call = backend.build(case), {}
    if backend.framework == "keras":
        by_call = {"training": True}
    else:
        model.train()
    run = compiled(backend, lambda model, *inputs: model(*inputs, **by_call))
    losses = backend.array(run(model, *inputs_of(backend, case)))
    params = param_tree(case.config).parameters()
    weights = backend.runtime.read(model)
    kept = {path: weights[path] for path, param in params.items() if param.role in STATISTICS}
    return {"losses": losses, **kept}


def test_in_training_the_teacher_has_statistics_of_its_own(backend: Subject) -> None:
    """Keras would keep those of a layer that does not train, and normalise by them."""
    case = Case(MOVED["dino_with_batch_norm"].config, batch=4)
    found = trained(backend, case)
    for path in found.keys() - {"losses"}:
        assert not np.array_equal(found[path], case.weights[path]), path
    assert_agree(found, trained(Subject("torch", get_backend("torch")), case), "activation")


def test_a_local_view_of_the_nets_size_is_any_other_view(backend: Subject) -> None:
    """Its positions are the net's, bit for bit: the official model leaves them be as well."""
    size = LOCAL.config.net.image_size
    model = backend.build(Case(LOCAL.config.replace(local_image_size=size)))
    case = Case(LOCAL.config.replace(local_image_size=size))
    found = backend.array(model.project_student(*2 * [backend.tensor(case.images)]))
    np.testing.assert_array_equal(found[:, 2:], found[:, :2])


def teacher_gradient(backend: Subject, model: Any) -> np.ndarray:
    """The gradient of the losses by the teacher's views, which none should reach."""
    images = backend.tensor(CASE.images)
    shown = backend.tensor(CASE.others["teacher_images"])
    if backend.name in ("flax", "keras:jax"):
        import jax

        return np.asarray(jax.jit(jax.grad(lambda shown: model(images, shown).sum()))(shown))
    if backend.name == "keras:tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(shown)
            losses = model(images, shown)
        nothing = tf.UnconnectedGradients.ZERO
        return tape.gradient(losses, shown, unconnected_gradients=nothing).numpy()
    shown, images = shown.detach().requires_grad_(), images.detach().requires_grad_()
    losses = model(images, shown).sum()
    _, found = torch.autograd.grad(losses, [images, shown], materialize_grads=True)
    return found.numpy()


def leave_gradients_be(backend: Subject, patch: pytest.MonkeyPatch) -> None:
    """Take every stop of gradients out of a framework."""
    if backend.framework == "torch":
        patch.setattr(torch, "no_grad", torch.enable_grad)
        patch.setattr(torch.Tensor, "detach", lambda self: self)
    elif backend.framework == "flax":
        import jax

        patch.setattr(jax.lax, "stop_gradient", lambda x: x)
    else:
        import keras

        patch.setattr(keras.ops, "stop_gradient", lambda x: x)


def test_no_gradient_reaches_the_teacher(backend: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    model = backend.build(CASE)
    assert not teacher_gradient(backend, model).any()
    leave_gradients_be(backend, monkeypatch)  # and now one does
    assert np.abs(teacher_gradient(backend, model)).max() > 1e-6


# --- the spec -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MOVED)
def test_a_teacher_starts_as_its_student(name: str) -> None:
    config = MOVED[name].config
    drawn = init(config, seed=3)
    teacher = {path for path in drawn if path.startswith("teacher.")}
    assert len(teacher) == (len(drawn) - 1) / 2
    for path in teacher:
        student = drawn[path.replace("teacher.", "student.", 1)]
        np.testing.assert_array_equal(drawn[path], student, err_msg=path)
    assert not drawn["center"].any()


def test_probe_weights_tell_teacher_and_student_apart() -> None:
    """Else a test could not see which of the two a model has used; what is fixed stays."""
    config = MOVED["dino_with_random_features"].config
    drawn, params = probe(config), param_tree(config).parameters()
    assert drawn["center"].any()
    for path, param in params.items():
        if param.source:
            alike = np.array_equal(drawn[path], drawn[param.source])
            assert alike is not params[param.source].trainable, path


def test_the_teacher_skips_no_branch() -> None:
    config = variant("dino_vit_s16")
    assert config.net.drop_path_rate == 0.1
    assert config.teacher_net == config.net.replace(drop_path_rate=0.0)
    net = ViTConfig(**NET, drop_path_rate=0.2)
    model = model_class("torch", "dino")(DINOConfig(net=net, **HEAD))
    rates = [part.net.blocks[-1].drop_path1.rate for part in (model.student, model.teacher)]
    assert rates == [0.2, 0.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"net": ViTConfig(**{**NET, "num_classes": 3})}, r"net\.num_classes=3: must be 0"),
        ({"net": ViTConfig(**NET, pool="none")}, "net='vit': must return one vector"),
        ({"views": 1, "teacher_views": 1}, "views=1: no pair"),
        ({"bottleneck_dim": 1}, "bottleneck_dim=1: of length 1, one number is a sign"),
        ({"out_dim": 1}, "out_dim=1: one number is always probability 1"),
        ({"last_layer": "dense"}, "last_gain_trains=True: needs last_layer=weight_norm"),
        ({"student_temp": 0.0}, "student_temp=0.0"),
        ({"net": CASE.config}, "net: wanted the config of a model, got dino"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CASE.config.replace(
            **{k: getattr(v, "to_dict", lambda v=v: v)() for k, v in changes.items()}
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"local_image_size": (7, 12)}, r"local_image_size=\(7, 12\): the net .* height 7 must be"),
        ({"local_image_size": (6, 0)}, r"local_image_size\[1\]=0"),
        ({"local_views": -1}, "local_views=-1"),
        ({"net": NETS[-1].to_dict()}, f"local_views=2: needs a vit, .* got {NETS[-1].family}"),
    ],
    ids=["size", "no size", "fewer than none", "another family"],
)
def test_local_views_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    assert NETS[-1].family != "vit"
    with pytest.raises(InputError, match=message):
        LOCAL.config.replace(**changes)


def test_every_local_view_is_compared_with_all_that_the_teacher_sees() -> None:
    """Also with a view of the teacher's that has its number."""
    config = TRAINERS["dino_local_patches"].config
    assert (config.views, config.teacher_views, config.local_views) == (1, 2, 2)
    assert config.pairs == ((0, 1), (0, 2), (1, 0), (1, 1), (1, 2))


def test_local_views_count_as_they_are_seen() -> None:
    """Multiply-adds: of the student's, one net for each view, and one head."""
    config = LOCAL.config
    net, local_net = (param_tree(c).multiply_adds() for c in (config.net, config.local_net))
    none = param_tree(config.replace(local_views=0)).multiply_adds()
    dims = (*config.head_dims, config.out_dim)
    head = sum(a * b for a, b in itertools.pairwise(dims))
    assert none == 4 * (net + head)
    assert param_tree(config).multiply_adds() == none + 2 * (local_net + head)


def test_without_local_views_the_same_is_drawn() -> None:
    """And with them the teacher's views stay as they were."""
    without = LOCAL.config.replace(local_views=0)
    assert CASE.others.keys() == Case(without).others.keys() == {"teacher_images"}
    assert list(LOCAL.others) == ["teacher_images", "local_images"]
    shown = Case(without).others["teacher_images"]
    np.testing.assert_array_equal(LOCAL.others["teacher_images"], shown)


@pytest.mark.parametrize("which", ["images", "teacher_images"])
def test_views_of_another_number_are_refused(backend: Subject, which: str) -> None:
    given = {"images": CASE.images, **CASE.others}
    given[which] = given[which][:, :1]
    model = backend.build(CASE)
    with pytest.raises(InputError, match=rf"{which} have the shape \(2, 1, 12, 8, 3\); DINO wants"):
        model(*(backend.tensor(given[name]) for name in ("images", "teacher_images")))


WANTED = r"DINO wants \(batch, 2, 6, 12, 3\): batch, views, height, width, channels"


@pytest.mark.parametrize(
    ("case", "shape", "message"),
    [
        (LOCAL, None, f"local_images are missing; {WANTED}"),
        (LOCAL, (2, 1, 6, 12, 3), rf"local_images have the shape \(2, 1, 6, 12, 3\); {WANTED}"),
        (LOCAL, (2, 2, 12, 6, 3), rf"local_images have the shape \(2, 2, 12, 6, 3\); {WANTED}"),
        (CASE, (2, 1, 6, 12, 3), r"\(2, 1, 6, 12, 3\); DINO wants none: local_views=0"),
    ],
    ids=["missing", "number", "size", "not wanted"],
)
def test_other_local_views_are_refused(
    backend: Subject, case: Case, shape: tuple[int, ...] | None, message: str
) -> None:
    model = backend.build(case)
    images, shown = (backend.tensor(x) for x in (case.images, case.others["teacher_images"]))
    local = None if shape is None else backend.tensor(np.zeros(shape))
    with pytest.raises(InputError, match=message):
        model(images, shown, local_images=local)


# --- the originals --------------------------------------------------------------------------------


class Pick(nn.Module):
    """In the place of what makes views by chance: one of those that are given."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One of the second axis."""
        return x[:, self.index]


def channels_first(views: np.ndarray) -> torch.Tensor:
    """(batch, views, channels, height, width) float64."""
    return torch.tensor(views, dtype=torch.float64).permute(0, 1, 4, 2, 3)


PYTORCH = {
    "as in the README": dict(projection_layers=4, student_temp=0.9, teacher_temp=0.04),
    "two layers": dict(projection_layers=2, student_temp=0.3, teacher_temp=0.2),
}


def vit_pytorch_pair(told: dict[str, Any], config: pytest.Config) -> tuple[Any, DINOConfig]:
    """A learner of vit-pytorch's with random weights, which sees our views, and its config."""
    import_oracle("vit_pytorch.dino", config)
    from vit_pytorch import ViT
    from vit_pytorch.dino import Dino

    net = ViTConfig(
        image_size=8, patch_size=4, num_classes=0, patch_embed="norm_linear_norm", embed_dim=12,
        depth=1, num_heads=2, head_dim=5, qkv_bias=False, mlp_dim=14, norm_eps=1e-5,
    )  # fmt: skip
    theirs = ViT(
        image_size=8, patch_size=4, num_classes=3, dim=12, depth=1, heads=2, dim_head=5, mlp_dim=14
    )
    learner: Any = Dino(
        theirs, image_size=8, hidden_layer="to_latent", projection_hidden_size=10,
        num_classes_K=11, moving_average_decay=DECAY, center_moving_average_decay=MOMENTUM,
        augment_fn=nn.Identity(), augment_fn2=nn.Identity(), **told,
    )  # fmt: skip
    learner = randomised(learner.double())
    with torch.no_grad():
        for param in learner.teacher_encoder.parameters():
            param.copy_(param + torch.randn(param.shape).double() / 10)
        learner.teacher_centers.copy_(torch.randn(1, 11) / 2)
    # Of (batch, 4, …): first the student's views, then the teacher's.
    learner.augment1, learner.augment2 = nn.Identity(), nn.Identity()
    pairs = [(Pick(0), Pick(2)), (Pick(1), Pick(3))]
    calls = {"local": 0, "global": 0}

    def crop(kind: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def picked(x: torch.Tensor) -> torch.Tensor:
            calls[kind] += 1
            return pairs[(calls[kind] - 1) % 2][kind == "global"](x)

        return picked

    for kind in calls:
        vars(learner)["_modules"].pop(f"{kind}_crop")
        setattr(learner, f"{kind}_crop", crop(kind))
    ours = DINOConfig(
        net=net,
        head_layers=told["projection_layers"] - 1,
        head_hidden_dim=10,
        bottleneck_dim=10,
        head_last_activation=True,
        normalize_eps=1e-6,
        last_layer="dense",
        out_dim=11,
        student_temp=told["student_temp"],
        teacher_temp=told["teacher_temp"],
    )
    return learner, ours


def read_state(state: Mapping[str, torch.Tensor], format: str, config: DINOConfig) -> Weights:
    """A state dict as canonical weights."""
    arrays = {name: tensor.detach().numpy().copy() for name, tensor in state.items()}
    params = param_tree(config).parameters()
    found = rename_table(format, config).read(params, arrays, FORMATS[format].layout)
    return {path: found[path] for path in params}


@pytest.mark.oracles
@pytest.mark.parametrize("name", PYTORCH)
def test_vit_pytorch(backend: Subject, name: str, pytestconfig: pytest.Config) -> None:
    """Its losses, and its weights behind a step."""
    torch.manual_seed(0)
    learner, config = vit_pytorch_pair(PYTORCH[name], pytestconfig)
    case = Case(config)
    vars(case)["weights"] = read_state(learner.state_dict(), "vit_pytorch", config)
    views = channels_first(np.concatenate([case.images, case.others["teacher_images"]], axis=1))
    with torch.no_grad():
        wanted = np.array([learner(view).item() for view in views.split(1)])  # one by one
        learner(views)
        learner.update_moving_average()
    model = backend.build(case)
    assert_outputs_agree(step(backend, case, model), wanted)
    moved = read_state(learner.state_dict(), "vit_pytorch", config)
    assert_agree(backend.runtime.read(model), moved, "output")


def official_pair(config: pytest.Config, **changes: Any) -> tuple[official.Training, DINOConfig]:
    """The official head and loss around timm's ViT, with random weights, and its config."""
    timm = import_oracle("timm.models.vision_transformer", config)
    net = ViTConfig(
        image_size=(8, 12), patch_size=4, num_classes=0, embed_dim=12, depth=1, num_heads=3,
        mlp_dim=24,
    )  # fmt: skip
    ours = DINOConfig(
        net=net, head_hidden_dim=14, bottleneck_dim=9, out_dim=11, last_gain_trains=True,
        **changes or {"views": 4},
    )  # fmt: skip
    backbones = tuple(
        timm.VisionTransformer(
            img_size=(8, 12), patch_size=4, embed_dim=12, depth=1, num_heads=3, mlp_ratio=2,
            num_classes=0,
        )
        for _ in range(2)
    )  # fmt: skip
    training = official.Training(backbones, ours)
    for network in (training.student, training.teacher):
        randomised(network)
    with torch.no_grad():
        for param in training.teacher.parameters():
            param.copy_(param + torch.randn(param.shape).double() / 10)
    training.center = torch.randn(1, 11).double() / 2
    return training, ours


CROPS: dict[str, dict[str, Any]] = {
    "of one size": {"views": 4},
    "local ones": {"local_views": 3, "local_image_size": (12, 8)},
    "small ones": {"local_views": 1, "local_image_size": 4},
    "of as many rows": {"local_views": 2, "local_image_size": (8, 20)},
    "local ones of the net's size": {"local_views": 2, "local_image_size": (8, 12)},
}


@pytest.mark.oracles
@pytest.mark.parametrize("name", CROPS)
def test_the_official_head_loss_crops_and_file(
    backend: Subject, name: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """Read from the file of a training; then its losses, and its weights behind a step."""
    torch.manual_seed(0)
    training, config = official_pair(pytestconfig, **CROPS[name])
    torch.save(training.checkpoint(), tmp_path / "a.pth")
    case = Case(config)
    vars(case)["weights"] = dict(isovit.load(tmp_path / "a.pth", config=config).weights)
    given = {"images": case.images, **case.others}

    def views(name: str, rows: slice) -> list[torch.Tensor]:
        return list(channels_first(given[name][rows]).unbind(1)) if name in given else []

    def loss(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        crops = views("images", rows) + views("local_images", rows)
        return training.loss(crops, views("teacher_images", rows))

    one_by_one = [loss(slice(i, i + 1))[0] for i in range(case.batch)]
    wanted = np.array([value.item() for value in one_by_one])
    slope = torch.autograd.grad(one_by_one[0], training.student.backbone.pos_embed)[0]
    training.move(loss(slice(None))[1], MOMENTUM, DECAY)
    model = backend.build(case)
    gradients = backend.runtime.gradients(
        model, case.images, np.eye(case.batch)[0], case.others
    ).weights
    assert_agree({"": gradients["student.net.pos_embed"]}, {"": slope.numpy()}, "gradient")
    assert_outputs_agree(step(backend, case, model), wanted)
    torch.save(training.checkpoint(), tmp_path / "b.pth")
    moved = isovit.load(tmp_path / "b.pth", config=config).weights
    assert_agree(backend.runtime.read(model), dict(moved), "output")


@pytest.mark.oracles
def test_a_file_of_the_official_code(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """Whole where all is wanted, the teacher's model where not; what does not fit is refused."""
    training, config = official_pair(pytestconfig)
    torch.save(training.checkpoint(optimizer={"state": {}}), tmp_path / "a.pth")
    whole = isovit.load(tmp_path / "a.pth", config=config)
    alone = isovit.load(tmp_path / "a.pth", changes={"num_heads": 3, "image_size": (8, 12)})
    assert alone.config.family == "vit"
    for path, array in alone.weights.items():
        np.testing.assert_array_equal(array, whole.weights[f"teacher.net.{path}"])
    with pytest.raises(InputError, match="misshaped"):
        isovit.load(tmp_path / "a.pth", config=config.replace(out_dim=12), format="dino")
    with pytest.raises(InputError, match="two models and a centre, which are read and not written"):
        isovit.save(whole, tmp_path / "b.pth", "dino")


def has_names(net: Config) -> bool:
    """Whether vit-pytorch has a model with just these parameters."""
    try:
        table, layout = rename_table("vit_pytorch", net), FORMATS["vit_pytorch"].layout
        table.write(param_tree(net).parameters(), probe(net), layout)
    except InputError:
        return False
    return True


@pytest.mark.parametrize("net", list(filter(has_names, NETS)), ids=lambda net: net.family)
def test_vit_pytorchs_names_hold_any_model_that_it_has(net: Config) -> None:
    """Every parameter has a name of its own, and comes back from it."""
    config = DINOConfig(net=net, last_layer="dense", **HEAD)
    params, weights = param_tree(config).parameters(), probe(config)
    table, layout = rename_table("vit_pytorch", config), FORMATS["vit_pytorch"].layout
    foreign = table.write(params, weights, layout)
    sides = ("student_encoder.", "teacher_encoder.", "teacher_centers")
    assert all(name.startswith(sides) for name in foreign)
    found = table.read(params, foreign, layout)
    for path, array in weights.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)


def test_those_models_are_of_most_families() -> None:
    assert len({net.family for net in NETS if has_names(net)}) >= 9


@pytest.mark.oracles
@pytest.mark.parametrize(
    "change",
    [
        {"head_last_activation": False},
        {"normalize_eps": 3.0},
        {"student_temp": 0.04, "teacher_temp": 0.9},
        {"net.norm_eps": 1e-6},
    ],
    ids=str,
)
def test_a_config_that_is_not_the_originals_is_seen(
    change: dict[str, Any], pytestconfig: pytest.Config
) -> None:
    torch.manual_seed(0)
    learner, config = vit_pytorch_pair(PYTORCH["as in the README"], pytestconfig)
    weights = read_state(learner.state_dict(), "vit_pytorch", config)
    case = Case(config)
    views = channels_first(np.concatenate([case.images, case.others["teacher_images"]], axis=1))
    with torch.no_grad():
        wanted = np.array([learner(view).item() for view in views.split(1)])
    found = reference(config.replace(**change), weights, case.images, case.others)[""]
    with pytest.raises(AssertionError, match="output beyond 1e-12"):
        assert_outputs_agree(found, wanted)
