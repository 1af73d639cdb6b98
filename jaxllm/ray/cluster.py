"""The Ray cluster: how this process comes to it, and what an engine gets of it."""

from __future__ import annotations

import importlib
import logging
import os
from pathlib import Path
from typing import Any

from jaxllm.api import checks
from jaxllm.api.errors import JaxLLMError, ValidationError
from jaxllm.api.extras import how_to_install
from jaxllm.config.engine_args import EngineArgs, engine_args

logger = logging.getLogger(__name__)


def import_ray() -> Any:
    """The package ray. Raises JaxLLMError where it is not installed."""
    try:
        return importlib.import_module("ray")
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise JaxLLMError(f"ray is not installed: {how_to_install('ray')}.") from None


def connect() -> bool:
    """Connect to a cluster, or start one on this machine, where the program has not done so; returns whether it did.

    What is started has no dashboard and reports to nobody.
    """
    ray = import_ray()
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(include_dashboard=False, logging_level=logging.ERROR)
    return True


def worker_arguments(model: str | os.PathLike[str], arguments: dict[str, Any]) -> tuple[EngineArgs, dict[str, Any]]:
    """An engine's arguments, checked here, before a process of the cluster starts; and with absolute paths, since
    such a process may be in another folder.

    Raises TypeError and ValidationError as `LLM` does.
    """
    given = {"model": model, **arguments}
    for name in ("model", "tokenizer"):
        value = given.get(name)
        if isinstance(value, (str, os.PathLike)) and (path := Path(value).expanduser()).exists():
            given[name] = str(path.absolute())
    return engine_args(**given), given


def machines() -> list[dict[str, float]]:
    """What each machine of the cluster has of every kind."""
    return [node["Resources"] for node in import_ray().nodes() if node["Alive"]]


def resources(
    machines: list[dict[str, float]],
    args: EngineArgs,
    num_engines: int,
    num_cpus: float | None,
    num_gpus: float | None,
    *,
    spare_cpus: int = 0,
) -> dict[str, float]:
    """What Ray reserves for each of so many engines: its ``num_cpus`` and ``num_gpus``.

    Args:
        machines: what each has.
        num_cpus: None: an equal share of the cluster's; where there are GPUs, 1.
        num_gpus: None: one for each device of the engine, where the cluster has GPUs.
        spare_cpus: of each machine, not to be given to engines by default.

    Raises:
        ValidationError: the cluster has no room for that many.
    """
    for name, value in (("num_cpus", num_cpus), ("num_gpus", num_gpus)):
        if value is not None and checks.real(name, value) < 0:
            raise ValidationError(f"{name} must be at least 0, got {value}.")
    has_gpus = any(machine.get("GPU") for machine in machines) and args.device != "cpu"
    gpus = num_gpus if num_gpus is not None else args.grid.size if has_gpus else 0
    cpus = num_cpus
    if cpus is None:
        most = 1 if gpus else max(int(machine.get("CPU", 0)) - spare_cpus for machine in machines)
        fitting = (count for count in range(most, 1, -1) if _room(machines, count, gpus, spare_cpus) >= num_engines)
        cpus = next(fitting, 1)
    if (room := _room(machines, cpus, gpus)) < num_engines:
        total = ", ".join(f"{machine.get('CPU', 0):g} CPUs and {machine.get('GPU', 0):g} GPUs" for machine in machines)
        raise ValidationError(
            f"num_engines={num_engines} with num_cpus={cpus:g} and num_gpus={gpus:g} each do not fit into the Ray "
            f"cluster, whose machines have {total}: {room:g} would fit."
        )
    return {"num_cpus": cpus, "num_gpus": gpus}


def _room(machines: list[dict[str, float]], cpus: float, gpus: float, spare_cpus: int = 0) -> float:
    """How many engines fit, each whole on one machine."""

    def of(machine: dict[str, float]) -> float:
        by_cpus = max(machine.get("CPU", 0) - spare_cpus, 0) // cpus if cpus else float("inf")
        return min(by_cpus, machine.get("GPU", 0) // gpus if gpus else float("inf"))

    return sum(map(of, machines))


def environment(wanted: dict[str, float]) -> dict[str, str]:
    """Variables for the process of an engine with these resources, read when JAX starts: the threads that XLA takes on
    a CPU, and no looking for GPUs that are not the engine's.
    """
    threads = {"NPROC": str(max(int(wanted["num_cpus"]), 1))}
    return threads if wanted["num_gpus"] else {**threads, "JAX_PLATFORMS": "cpu"}
