"""The random number generators, epochs and counters that a run may draw from, as plain JSON."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.quasirandom import SobolEngine

from ..errors import DamagedError, InputError
from .sources import Sources, epoch_of

__all__ = ["capture", "check", "check_form", "kept", "restore"]

_MOST = {"pos": 624, "buffer_pos": 4}  # of NumPy's states, which check no index before they read there
_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
)
_OF_SOBOL = ("sobolstate", "shift", "quasi", "_first_point", "num_generated")


def capture(roots: Mapping[str, Any] | None = None, sources: Sources | None = None) -> dict[str, Any]:
    """States of torch (CPU and CUDA), Python and NumPy, and of all that is found below ``roots``; ``sources``: that,
    where the caller has looked already."""
    sources = Sources(roots or {}) if sources is None else sources
    return {
        "torch": _encode(torch.get_rng_state()),
        "cuda": [_encode(state) for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": _to_json(np.random.get_state(legacy=False)),
        "generators": [
            {
                "paths": {path: _class(sources.objects.get(path.rpartition(".")[0])) for path in paths},
                "kind": _kind(generator),
                "state": _state(generator),
            }
            for paths, generator in sources.generators
        ],
        "epochs": {path: epoch_of(owner) for path, owner in sources.epochs.items()},
        "counters": {path: _counters(owner) for path, owner in sources.counters.items()},
        "states": {path: text for path, owner in sources.stateful.items() if (text := _json_of(owner)) is not None},
    }


@contextlib.contextmanager
def kept(roots: Mapping[str, Any] | None = None) -> Iterator[None]:
    """All of these states are afterwards what they were before, unless the block raised."""
    state = capture(roots)
    yield
    restore(state, roots)


def check(state: Mapping[str, Any], roots: Mapping[str, Any]) -> None:
    """Whether :func:`restore` can put a saved state back; InputError if not."""
    check_form(state, roots)
    sources = Sources(roots)
    now = {path: generator for paths, generator in sources.generators for path in paths}
    saved = {path: entry["kind"] for entry in state["generators"] for path in entry["paths"]}
    missing = [
        next(iter(entry["paths"]))
        for entry in state["generators"]
        if not any(path in now or _can_make(path, owner, sources) for path, owner in entry["paths"].items())
    ]
    new = [paths[0] for paths, _ in sources.generators if not any(path in saved for path in paths)]
    if missing or new:
        raise InputError(
            f"the data had {len(state['generators'])} generators of its own when the checkpoint was made and has "
            f"{len(sources.generators)} now: pass the same loaders ({(missing or new)[0]} is "
            f"{'missing' if missing else 'new'})"
        )
    for path in now.keys() & saved.keys():
        if _kind(now[path]) != saved[path]:
            raise InputError(
                f"{path} was a generator of kind {saved[path]} when the checkpoint was made and is one of "
                f"{_kind(now[path])} now: pass the same loaders"
            )


def check_form(state: Any, roots: Mapping[str, Any]) -> None:
    """Whether a saved state is what :func:`capture` gives: tried on other generators, before any is changed.

    Raises:
        DamagedError: it is not.
    """
    now = {path: generator for paths, generator in Sources(roots).generators for path in paths}
    try:
        of_numpy = f"numpy.RandomState.{state['numpy']['bit_generator']}"
        states = [("torch.cpu", state["torch"]), ("random", state["python"]), (of_numpy, state["numpy"])]
        for entry in state["generators"]:
            present = [now[path] for path in entry["paths"] if path in now]
            if not present or _is_of_library(present[0]):  # else of the user's, which reads its own
                states.append((entry["kind"], entry["state"]))
        whole = all(_is_of(kind, saved) for kind, saved in states) and all(map(len, map(_decode, state["cuda"])))
        whole &= all(map(_is_count, state["epochs"].values()))
        for counters in state["counters"].values():
            whole &= all(
                value is None or (isinstance(value, (int, float)) and not name.startswith("__"))
                for name, value in counters.items()
            )
        for text in state["states"].values():
            json.loads(text)
    except _ERRORS:
        whole = False
    if not whole:
        raise DamagedError("the checkpoint is damaged: its random state cannot be read; resume from an earlier one")


def _is_of_library(generator: Any) -> bool:
    bits = getattr(generator, "bit_generator", generator)
    return all(type(part).__module__.partition(".")[0] in ("numpy", "random", "torch") for part in (generator, bits))


def _is_of(kind: str, state: Any) -> bool:
    """Whether a new generator of a kind has just this state when it was set."""
    if kind.startswith("torch.") and kind != "torch.cpu":
        return len(_decode(state)) > 0  # its device may not be here; check() compares kinds
    generator = _new(kind)
    if isinstance(generator, SobolEngine):
        fresh, saved = _from_json(_state(generator)), _from_json(state)
        return fresh.keys() == saved.keys() and all(
            fresh[name].shape == saved[name].shape and fresh[name].dtype.kind == saved[name].dtype.kind
            for name in fresh
        )
    inner = state.get("state") if isinstance(state, dict) else None
    for values in (state, inner) if isinstance(inner, dict) else ():
        if any(not 0 <= values[name] <= most for name, most in _MOST.items() if name in values):
            return False
    if kind == "random" and not isinstance(state[2], (float, type(None))):  # which it does not look at
        return False
    _set_state(generator, state)
    return json.loads(json.dumps(_state(generator))) == json.loads(json.dumps(state))


def _is_count(value: Any) -> bool:
    return value is None or (isinstance(value, int) and 0 <= value < 2**31)


def restore(state: Mapping[str, Any], roots: Mapping[str, Any] | None = None) -> None:
    """Puts back what :func:`capture` has found below the same ``roots``. A generator that a sampler or data set makes
    when it first needs one is made."""
    torch.set_rng_state(_decode(state["torch"]))
    if state["cuda"] and torch.cuda.is_available():
        for index, text in enumerate(state["cuda"][: torch.cuda.device_count()]):  # there may have been more
            torch.cuda.set_rng_state(_decode(text), index)
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(_from_json(state["numpy"]))
    if not roots:
        return
    sources = Sources(roots)
    for path, epoch in state["epochs"].items():  # first: to set it may seed a generator
        owner = sources.epochs.get(path)
        if owner is not None and epoch is not None and epoch_of(owner) != epoch:
            owner.set_epoch(epoch)
    for path, text in state["states"].items():
        if path in sources.stateful and _json_of(sources.stateful[path]) != text:
            sources.stateful[path].load_state_dict(json.loads(text))
    for path, counters in state["counters"].items():
        if path in sources.counters:
            _set_counters(sources.counters[path], counters)
    now = {path: generator for paths, generator in Sources(roots).generators for path in paths}
    for entry in state["generators"]:
        present = [now[path] for path in entry["paths"] if path in now]
        for generator in present or [_make(entry, sources)]:
            _set_state(generator, entry["state"])


# --- Generators -----------------------------------------------------------------------------------------------


def _kind(generator: Any) -> str:
    if isinstance(generator, torch.Generator):
        return f"torch.{generator.device}"
    if isinstance(generator, random.Random):
        return "random"
    if isinstance(generator, SobolEngine):
        return f"SobolEngine.{generator.dimension}"
    if isinstance(generator, np.random.BitGenerator):
        return f"numpy.BitGenerator.{type(generator).__name__}"
    bits = generator._bit_generator if isinstance(generator, np.random.RandomState) else generator.bit_generator
    return f"numpy.{type(generator).__name__}.{type(bits).__name__}"


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return _encode(generator.get_state())
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, SobolEngine):
        return _to_json({name: np.asarray(getattr(generator, name)) for name in _OF_SOBOL})
    if isinstance(generator, np.random.RandomState):
        return _to_json(generator.get_state(legacy=False))
    return _to_json(getattr(generator, "bit_generator", generator).state)


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(_decode(state))
    elif isinstance(generator, random.Random):
        version, keys, gauss = state
        generator.setstate((version, tuple(keys), gauss))
    elif isinstance(generator, SobolEngine):
        for name, value in _from_json(state).items():
            setattr(generator, name, torch.from_numpy(value) if value.ndim else value.item())
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(_from_json(state))
    else:
        getattr(generator, "bit_generator", generator).state = _from_json(state)


def _class(owner: Any) -> str:
    return f"{type(owner).__module__}.{type(owner).__qualname__}"


def _can_make(path: str, owner_class: str, sources: Sources) -> bool:
    """Whether it is an attribute, not set yet, of an object that is there and of the class that it was of."""
    owner, _, name = path.rpartition(".")
    owner = sources.objects.get(owner)
    return owner is not None and _class(owner) == owner_class and "[" not in name and getattr(owner, name, None) is None


def _make(entry: Mapping[str, Any], sources: Sources) -> Any:
    paths = [path for path, owner in entry["paths"].items() if _can_make(path, owner, sources)]
    if not paths:
        raise InputError(
            f"{next(iter(entry['paths']))}, a generator that the data had when the checkpoint was made, is missing: "
            "pass the same loaders"
        )
    generator = _new(entry["kind"])
    for path in paths:
        owner, _, name = path.rpartition(".")
        setattr(sources.objects[owner], name, generator)
    return generator


def _new(kind: str) -> Any:
    library, _, rest = kind.partition(".")
    if library == "torch":
        return torch.Generator(rest)
    if library == "random":
        return random.Random()
    if library == "SobolEngine":
        return SobolEngine(int(rest))
    name, _, bits = rest.partition(".")
    if name not in ("BitGenerator", "Generator", "RandomState") or not issubclass(
        getattr(np.random, bits), np.random.BitGenerator
    ):
        raise ValueError(f"no kind of generator: {kind}")
    generator = getattr(np.random, bits)()
    return generator if name == "BitGenerator" else getattr(np.random, name)(generator)


# --- Counters -------------------------------------------------------------------------------------------------


def _counters(owner: Any) -> dict[str, Any]:
    """Numbers that a sampler keeps, and None where it may keep something later. A module's mode is no such number:
    looks are made in eval mode."""
    return {
        name: value if value is None else (value.item() if isinstance(value, np.generic) else value)
        for name, value in getattr(owner, "__dict__", {}).items()
        if (value is None or isinstance(value, (bool, int, float, np.bool_, np.integer, np.floating)))
        and name != "training"
    }


def _json_of(owner: Any) -> str | None:
    """What ``state_dict`` gives; None where JSON would not give it back."""
    try:
        state = owner.state_dict()
        text = json.dumps(state)
        return text if json.loads(text) == state else None
    except Exception:  # of the user's; tensors, too
        return None


def _set_counters(owner: Any, counters: Mapping[str, Any]) -> None:
    for name, value in counters.items():
        now = getattr(owner, name, None)
        if now is not value and (value is None or now is None or now != value):
            setattr(owner, name, value)


# --- JSON -----------------------------------------------------------------------------------------------------


def _encode(state: torch.Tensor) -> str:
    return state.cpu().numpy().tobytes().hex()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _to_json(value: Any) -> Any:
    """Of a state of NumPy's, in which arrays stand."""
    if isinstance(value, dict):
        return {key: _to_json(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return {"array": value.tolist(), "dtype": str(value.dtype)}
    return value.item() if isinstance(value, np.generic) else value


def _from_json(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if value.keys() == {"array", "dtype"}:
        if np.dtype(value["dtype"]).kind not in "biuf":  # else an item may be as large as it says
            raise ValueError(f"no dtype of a state: {value['dtype']}")
        return np.array(value["array"], dtype=value["dtype"])
    return {key: _from_json(item) for key, item in value.items()}
