"""A `Decoder` as an Orbax checkpoint: sharded weights, written and read by all hosts of a mesh.

    DIR/kvjax.json      the model's config in kvjax's own spelling, and the weights' dtype
    DIR/weights/        one array a parameter, named by its path: layers.3.attention.q_DX

Every host writes and reads its own shards; a checkpoint of one mesh restores on any other.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding
from jax.typing import DTypeLike

from kvjax import sharding
from kvjax.models.checkpoints.weights import check_reads_text, parameter_at, tensor_specs
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Decoder
from kvjax.models.rope_scaling import scaling_of

FORMAT = "kvjax-orbax-1"
CONFIG = "kvjax.json"
_DTYPES = ("float32", "bfloat16", "float16")


def save_orbax(model: Decoder, directory: str | Path) -> Path:
    """Write a checkpoint; the directory is made where it does not exist.

    Args:
      model: on one device or on a mesh; of a mesh that spans hosts every one of them calls this.
      directory: without a checkpoint yet.

    Returns:
      The directory.

    Raises:
      ValueError: a directory that holds a checkpoint already, or a vision-language model.
    """
    check_reads_text(model)
    folder = Path(directory).absolute()
    if (folder / "weights").exists():
        raise ValueError(f"directory {folder} holds weights already, expected none")
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        spec.attribute: parameter_at(model, spec.attribute)[...]
        for spec in tensor_specs(model.config).values()
    }
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "weights", arrays)
    facts = {
        "format": FORMAT,
        "dtype": model.embed.table_VD[...].dtype.name,
        "config": _fields(model.config),
    }
    if jax.process_index() == 0:
        text = json.dumps(facts, indent=2) + "\n"
        (folder / CONFIG).write_text(text, encoding="utf-8")
    return folder


def load_orbax(
    directory: str | Path, mesh: Mesh | None = None, *, dtype: DTypeLike | None = None
) -> Decoder:
    """Read what `save_orbax` wrote.

    Args:
      directory: of the checkpoint.
      mesh: with axes `data` and `model` (`kvjax.sharding.make_mesh`), of any shape: every host
        reads its own shards. JAX's default device without one.
      dtype: float32, bfloat16 or float16; by default that in which it was saved.

    Raises:
      ValueError: another dtype, no such checkpoint, or one that is damaged.
    """
    folder = Path(directory).absolute()
    config, saved = _read_config(folder / CONFIG)
    dtype = saved if dtype is None else jnp.dtype(dtype)
    if dtype.name not in _DTYPES:
        raise ValueError(f"dtype={dtype.name!r}, expected one of {', '.join(_DTYPES)}")
    if mesh is not None:
        mesh = sharding.fitted(mesh, config.num_heads, config.num_kv_heads)
    one = SingleDeviceSharding(jnp.zeros(()).device)  # type: ignore[arg-type]
    specs = tensor_specs(config).values()
    wanted = {
        spec.attribute: jax.ShapeDtypeStruct(
            spec.shape,
            dtype,
            sharding=one if mesh is None else sharding.named(spec.axes, spec.shape, mesh),
        )
        for spec in specs
    }
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            arrays = checkpointer.restore(folder / "weights", wanted)
    except (FileNotFoundError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"directory {folder} holds no whole Orbax checkpoint ({reason})") from None
    decoder = nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0)))
    for attribute, array in arrays.items():
        parameter_at(decoder, attribute).set_value(array)
    return decoder


def load_orbax_config(directory: str | Path) -> ModelConfig:
    """The model's config, of what `save_orbax` wrote.

    Raises:
      ValueError: no such checkpoint, or one that is damaged.
    """
    return _read_config(Path(directory) / CONFIG)[0]


def is_orbax(directory: str | Path) -> bool:
    """Whether `save_orbax` wrote this directory."""
    return (Path(directory) / CONFIG).is_file()


def _fields(config: ModelConfig) -> dict[str, Any]:
    """What a file says of a config: all but what follows, the user's own limit, and nothings."""
    given = {field.name for field in dataclasses.fields(config) if field.init}
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name in given}
    del fields["max_context"]
    if not config.stated_sampling:
        del fields["stated_sampling"]
    return fields


def _read_config(path: Path) -> tuple[ModelConfig, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8-sig"))
        if facts["format"] != FORMAT or facts["dtype"] not in _DTYPES:
            raise ValueError(f"format {facts['format']!r} and dtype {facts['dtype']!r}")
        fields = dict(facts["config"])
        scaling = fields["rope_scaling"]
        fields["rope_scaling"] = None if scaling is None else scaling_of(scaling)
        for name in ("sliding_windows", "eos_token_ids", "mrope_section"):
            fields[name] = None if fields.get(name) is None else tuple(fields[name])
        stated = fields.get("stated_sampling", ())
        fields["stated_sampling"] = tuple((name, value) for name, value in stated)
        return ModelConfig(**fields), jnp.dtype(facts["dtype"])
    except OSError:
        raise ValueError(f"{path} cannot be read, expected what save_orbax wrote") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not what save_orbax wrote ({error})") from None
