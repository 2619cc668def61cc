"""Which of how many processes this is, on a TPU slice, under Slurm, or by hand.

Every process evaluates its share of the documents on its own devices, and writes a file of its own:
no process waits for another, and one that dies leaves what it finished.
"""

import os

import jax

from kvjax.eval.runner import Workers

# By hand: these and JAX_COORDINATOR_ADDRESS=host:port.
COUNT, INDEX = "KVJAX_PROCESSES", "KVJAX_PROCESS"


def join() -> Workers:
    """Initialise `jax.distributed` from the environment; call it before anything touches a device.

    Cloud TPU slices, Slurm, Open MPI and Kubernetes are recognised by JAX itself; elsewhere
    KVJAX_PROCESSES, KVJAX_PROCESS and JAX_COORDINATOR_ADDRESS say what they would.

    Raises:
      ValueError: the environment says nothing of the kind, or half of it.
    """
    given = {name: os.environ.get(name) for name in (COUNT, INDEX, "JAX_COORDINATOR_ADDRESS")}
    by_hand = given[COUNT] is not None or given[INDEX] is not None
    if by_hand:
        for name, value in given.items():
            if not value or (name in (COUNT, INDEX) and not value.isdecimal()):
                what = "host:port" if name.startswith("JAX") else "an integer"
                raise ValueError(f"{name}={value!r}, expected {what} in the environment")
    count, index = (int(given[name] or 0) for name in (COUNT, INDEX))
    if by_hand and index >= count:
        raise ValueError(f"{INDEX}={index}, expected less than {COUNT}={count}")
    try:
        if by_hand:
            jax.distributed.initialize(num_processes=count, process_id=index)
        else:
            jax.distributed.initialize()
    except ValueError as error:
        raise ValueError(
            f"--distributed found no cluster ({str(error).rstrip('.')}), expected a TPU slice,"
            f" Slurm, or {COUNT}, {INDEX} and JAX_COORDINATOR_ADDRESS"
        ) from None
    return Workers(jax.process_index(), jax.process_count())
