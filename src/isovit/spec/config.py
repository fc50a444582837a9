"""The base of all configs: frozen, checked, and strict in and out of JSON and TOML.

A config holds every number and every convention that the mathematics of a model depends on.
Nothing is left to a framework's default, so a config means the same function everywhere.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    Self,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

import msgspec
import numpy as np

from isovit.errors import InputError

Positive = Annotated[int, msgspec.Meta(ge=1)]
NonNegative = Annotated[int, msgspec.Meta(ge=0)]
Rate = Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)]
Epsilon = Annotated[float, msgspec.Meta(gt=0.0)]
Pair = tuple[Positive, Positive]
"""Height and width. Wherever a pair is wanted, a single number ``n`` is read as ``(n, n)``."""
Stages = tuple[Positive, ...]
"""A number for each stage."""

Activation = Literal["gelu", "gelu_tanh"]
Pool = Literal["cls", "mean", "mean_patches", "none"]
FinalNorm = Literal["tokens", "pooled", "none"]
InitScheme = Literal["timm", "yitu", "vit_pytorch", "vit_jax"]


class PositionTable(NamedTuple):
    """What a table of positions is laid over.

    Attributes:
        grid: rows and columns of positions, row by row in the table's next to last axis.
        prefix: positions before them, of other tokens.
        windows: rows and columns of windows, where the positions go window by window, and within
            each row by row, in two axes of the table.
    """

    grid: tuple[int, int]
    prefix: int = 0
    windows: tuple[int, int] = (1, 1)


class ConfigError(InputError):
    """A config that cannot be: names the field, its value and the rule it breaks."""


class Preprocess(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a photograph becomes an input; part of the function that a checkpoint computes.

    Attributes:
        aspect: ``keep`` resizes so that the image just covers its box, ``squash`` so that it fills
            the box, each side by a factor of its own. The box is the input widened by the crop.
        crop_fraction: the side of the centre crop as a fraction of that box.
        interpolation: filter of the resize, as Pillow implements it.
        mean: per channel, in units of the full pixel range (0 to 1).
        std: per channel, in the same units.
    """

    aspect: Literal["keep", "squash"] = "keep"
    crop_fraction: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = 0.875
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[Epsilon, ...] = (0.229, 0.224, 0.225)


class BaseConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="family"
):
    """What every config has: those of the families of models, and those of objectives."""

    def __post_init__(self) -> None:
        """Bring every field to its type (list to tuple, ``n`` to a pair), then check the rules."""
        for name, hint in _hints(type(self)).items():
            value = _to_type(name, getattr(self, name), hint)
            msgspec.structs.force_setattr(self, name, value)
        self.check()

    def check(self) -> None:
        """Check the rules between fields; a family extends this.

        Raises:
            ConfigError: naming the field, its value and the rule.
        """

    def check_images(self, shape: Sequence[int | None]) -> None:
        """Check the shape of a batch of images; every model does so first.

        Without it other sizes pass where they give as many tokens, with positions that are wrong.

        Raises:
            InputError: if it is not (batch, height, width, channels) of this config.
        """
        wanted = self.input_shape
        if tuple(shape[1:]) != wanted:
            raise InputError(
                f"the images have the shape {tuple(shape)}; the model wants (batch, "
                f"{', '.join(map(str, wanted))}): batch, height, width, channels"
            )

    @property
    def family(self) -> str:
        """The family's name, as in the tables of families and of objectives."""
        return str(self.__struct_config__.tag)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of what a model is called with for one image; that of the one model within."""
        (config,) = self.parts.values()
        return config.input_shape

    @property
    def position_tables(self) -> Mapping[str, PositionTable]:
        """The learned tables that depend on the size of the image, by canonical path."""
        return {}

    @property
    def parts(self) -> Mapping[str, Config]:
        """Configs of the models that this one is made of, by the path of the module."""
        return self._configs()

    def draw(self, batch: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """What a model is called with beside the images, by the name of its argument."""
        return {}

    def replace(self, **changes: Any) -> Self:
        """A copy with other values; nested fields by dotted name, ``**{"preprocess.mean": …}``."""
        if changes.get("family", self.family) != self.family:
            raise ConfigError(f"family={changes['family']!r}: the model's family is {self.family}")
        for name, config in self._configs().items():
            inner = {key: changes.pop(key) for key in list(changes) if key.startswith(f"{name}.")}
            if inner:
                fields = {key.partition(".")[2]: value for key, value in inner.items()}
                changes[name] = config.replace(**fields)
        if "in_channels" in changes and not any(key.startswith("preprocess") for key in changes):
            changes = {**_default_statistics(changes["in_channels"]), **changes}
        return cast("Self", config_from_dict(_merge(self.to_dict(), changes)))

    def _configs(self) -> dict[str, Config]:
        """The fields that are configs of models."""
        fields = {name: getattr(self, name) for name in self.__struct_fields__}
        return {name: value for name, value in fields.items() if isinstance(value, Config)}

    def to_dict(self) -> dict[str, Any]:
        """The config as plain data, ``family`` included."""
        return msgspec.to_builtins(self)

    def to_json(self) -> str:
        """The config as JSON on one line."""
        return msgspec.json.encode(self).decode()

    def to_toml(self) -> str:
        """The config as TOML. A field that is None is left out: TOML has no such value."""
        import tomli_w

        return tomli_w.dumps(_without_none(self.to_dict()))


class Config(BaseConfig, frozen=True, kw_only=True):
    """What every family's config has.

    Attributes:
        image_size: height and width of the input, in pixels.
        in_channels: channels of the input.
        num_classes: width of the head; 0 for no head, in which case the features come out.
        preprocess: how a photograph becomes an input.
    """

    image_size: Pair = (224, 224)
    in_channels: Positive = 3
    num_classes: NonNegative = 1000
    preprocess: Preprocess = Preprocess()

    def check(self) -> None:
        """Check that the statistics are those of the channels."""
        super().check()
        for name in ("mean", "std"):
            values = getattr(self.preprocess, name)
            require(
                len(values) == self.in_channels,
                f"preprocess.{name}",
                values,
                f"needs one number for each of in_channels={self.in_channels}",
            )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Height, width and channels of an image."""
        return (*self.image_size, self.in_channels)


def _without_none(data: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(cast("Mapping[str, Any]", value)) if isinstance(value, dict) else value
        for key, value in data.items()
        if value is not None
    }


def require(ok: bool, field: str, value: object, rule: str) -> None:
    """Raise a ConfigError with the field, its value and the rule, unless ``ok``."""
    if not ok:
        raise ConfigError(f"{field}={value!r}: {rule}")


def require_stages(config: Any, names: Sequence[str], word: str = "stage") -> None:
    """Check that a config has a stage, a number for each in what has one for each, and fit heads.

    Args:
        config: whose ``embed_dims`` and ``num_heads`` have a number for each stage.
        names: of the other fields that have.
        word: what the family calls a stage.
    """
    stages = len(config.embed_dims)
    require(stages > 0, "embed_dims", config.embed_dims, f"needs one {word} or more")
    for name in ("num_heads", *names):
        values = getattr(config, name)
        rule = f"needs one number for each of the {stages} {word}s of embed_dims"
        require(len(values) == stages, name, values, rule)
    for i, (dim, heads) in enumerate(zip(config.embed_dims, config.num_heads, strict=True)):
        require(
            config.head_dim is not None or dim % heads == 0,
            f"embed_dims[{i}]",
            dim,
            f"must be divisible by num_heads[{i}]={heads}, unless head_dim is given",
        )


def require_model(config: BaseConfig, what: str) -> Config:
    """The config of a model; an objective has losses where a model has logits.

    Raises:
        InputError: naming the objective, and the models within it.
    """
    if isinstance(config, Config):
        return config
    parts = " or ".join(config.parts)
    raise InputError(
        f"{what} wants a model; {config.family} is an objective: isovit convert SRC DST --part "
        f"{parts} gives the model that it trains"
    )


def config_from_dict(data: Mapping[str, Any], source: str = "config") -> BaseConfig:
    """Read a config from plain data.

    Args:
        data: the fields, with ``family`` among them.
        source: what to call the data in an error.

    Raises:
        ConfigError: for an unknown family, an unknown field or a value that breaks a rule.
    """
    from isovit.spec.families import FAMILIES, config_class
    from isovit.spec.objectives import OBJECTIVES

    family, known = data.get("family"), (*FAMILIES, *OBJECTIVES)
    if not isinstance(family, str) or family not in known:
        raise ConfigError(f"{source}: family={family!r}: must be one of {', '.join(known)}")
    cls = config_class(family)
    hints = _hints(cls)
    fields = {key: value for key, value in data.items() if key != "family"}
    for key in fields:
        if key not in hints:
            raise ConfigError(f"{source}: {_unknown(key, family, hints)}")
    return cls(**fields)


def config_from_file(path: str | Path) -> BaseConfig:
    """Read a config from a JSON or TOML file.

    The file gives either every field that differs from the family's defaults beside ``family``,
    or ``variant`` (a published name) and the fields that differ from it.

    Raises:
        InputError: if the file cannot be read or parsed, or is no config.
    """
    from isovit.spec.families import variant_config

    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text) if path.suffix == ".toml" else msgspec.json.decode(text)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.DecodeError) as error:
        raise InputError(f"{path}: wanted a config as JSON or TOML, but {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: wanted a table of fields, got {type(data).__name__}")
    data = cast("dict[str, Any]", data)
    if "variant" in data:
        base = variant_config(str(data.pop("variant")))
        return base.replace(**_flatten(data))
    return config_from_dict(data, str(path))


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """Read ``field=value`` pairs; a value is JSON, or else a plain string.

    Raises:
        InputError: for a text without ``=``.
    """
    changes: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name:
            raise InputError(f"--set {assignment}: wanted FIELD=VALUE, e.g. --set depth=2")
        try:
            changes[name] = msgspec.json.decode(text)
        except msgspec.DecodeError:
            changes[name] = text
    return changes


def json_schema(cls: type[BaseConfig]) -> dict[str, Any]:
    """JSON Schema of a family's config, or an objective's.

    The config of a model within it that may be of any family is one of the families' schemas.
    """
    from isovit.spec.families import FAMILIES, config_class

    schema = msgspec.json.schema(cls)
    if Config.__name__ not in schema["$defs"]:
        return schema
    refs, defs = msgspec.json.schema_components(
        [config_class(family) for family in FAMILIES], ref_template="#/$defs/{name}"
    )
    return schema | {"$defs": schema["$defs"] | defs | {Config.__name__: {"anyOf": list(refs)}}}


def _hints(cls: type[msgspec.Struct]) -> dict[str, Any]:
    hints = get_type_hints(cls, include_extras=True)
    return {name: hints[name] for name in cls.__struct_fields__}


def _to_type(name: str, value: Any, hint: Any) -> Any:
    """A field's value as its annotation wants it, or the dotted path of what is wrong."""
    if hint == Pair and isinstance(value, int):
        value = (value, value)
    if hint is Preprocess:
        return _to_struct(name, value, hint)
    if _is_config(hint):
        return _to_config(name, value, hint)
    try:
        converted: Any = msgspec.convert(value, hint)
    except msgspec.ValidationError as error:
        _refuse_item(name, value, hint)
        rule = str(error).partition(" - at ")[0].replace("`", "").replace("Expected", "wanted")
        if rule.startswith("Invalid enum"):
            rule = f"wanted one of {', '.join(map(str, get_args(hint)))}"
        raise ConfigError(f"{name}={value!r}: {rule}") from None
    if not _is_finite(converted):
        raise ConfigError(f"{name}={value!r}: wanted finite numbers")
    return converted


def _is_config(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(cast("type[Any]", hint), Config)


def _is_finite(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_finite, cast("tuple[Any, ...]", value)))
    return not isinstance(value, float) or math.isfinite(value)


def _to_config(name: str, value: Any, cls: type[Config]) -> Config:
    """The config of a model within another."""
    if isinstance(value, Mapping):
        fields = cast("Mapping[str, Any]", value)
        value = config_from_dict({"family": cls.__struct_config__.tag, **fields}, name)
    if not isinstance(value, cls):
        wanted = "a model" if cls is Config else str(cls.__struct_config__.tag)
        came = value.family if isinstance(value, BaseConfig) else repr(value)
        raise ConfigError(f"{name}: wanted the config of {wanted}, got {came}")
    return value


def _to_struct(name: str, value: Any, cls: type[msgspec.Struct]) -> msgspec.Struct:
    if isinstance(value, cls):
        value = msgspec.structs.asdict(value)
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name}={value!r}: wanted a table of fields")
    fields, hints = cast("Mapping[str, Any]", value), _hints(cls)
    for key in fields:
        if key not in hints:
            raise ConfigError(_unknown(key, name, hints))
    return cls(**{key: _to_type(f"{name}.{key}", v, hints[key]) for key, v in fields.items()})


def _refuse_item(name: str, value: Any, hint: Any) -> None:
    """If one item of a tuple is what is wrong, raise the error for that item."""
    named = hasattr(hint, "_fields")  # a NamedTuple
    items = tuple(get_type_hints(hint, include_extras=True).values()) if named else get_args(hint)
    if not named and get_origin(hint) is not tuple:
        return
    if items and isinstance(value, list | tuple):
        values = cast("Sequence[Any]", value)
        items = items[:1] * len(values) if items[-1] is Ellipsis else items
        for i, (item, kind) in enumerate(zip(values, items, strict=False)):
            if len(items) == len(values):
                _to_type(f"{name}[{i}]", item, kind)


def _unknown(key: str, family: object, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"fields: {', '.join(sorted(known))}"
    return f"{key}: no such field of {family}; {hint}"


def _merge(data: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in changes.items():
        head, dot, rest = key.partition(".")
        if not dot:
            data[key] = value
        elif isinstance(data.get(head), dict):
            known = data[head]
            if rest not in known:
                raise ConfigError(_unknown(rest, head, known))
            known[rest] = value
        else:
            raise ConfigError(f"{key}: {head} has no fields of its own")
    return data


def _flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(cast("Mapping[str, Any]", value), f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _default_statistics(in_channels: object) -> dict[str, Any]:
    """The published mean and std are for colour; other inputs get the plain 0.5."""
    if in_channels == 3 or not isinstance(in_channels, int) or in_channels < 1:
        return {}
    half = (0.5,) * in_channels
    return {"preprocess.mean": half, "preprocess.std": half}
