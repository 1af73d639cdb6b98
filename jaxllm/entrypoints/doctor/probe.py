"""Imports JAX and asks it for its devices. A process of its own runs this file, since both may crash or hang."""

from __future__ import annotations

import json


def main() -> None:
    """Print one line of JSON: versions, devices, or why there are none."""
    import jax
    import jaxlib.version

    found: dict[str, object] = {"jax": jax.__version__, "jaxlib": jaxlib.version.__version__}
    found["compile_cache"] = jax.config.values.get("jax_compilation_cache_dir")
    try:
        found["devices"] = [
            {
                "platform": device.platform,
                "kind": device.device_kind,
                "memory": (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None,
            }
            for device in jax.devices()
        ]
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what the user has to know
        found["error"] = str(error).strip() or type(error).__name__
    print(json.dumps(found))


if __name__ == "__main__":
    main()
