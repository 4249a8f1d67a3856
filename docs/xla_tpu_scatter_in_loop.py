"""A sum that is scattered in a loop, cast and added up: XLA for TPUs fails on it. For the authors
of the compiler.

    pip install 'libtpu==0.0.42.*' 'jax==0.10.2' && python docs/xla_tpu_scatter_in_loop.py

No TPU is needed. The second program is the first with a barrier behind the scatter, and the third
without the casts; both compile. In the third the scatter is moved out of the loop, where it is run
once, of the sum.
"""

import os

os.environ.update(
    JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0"
)
os.environ.update(TPU_ACCELERATOR_TYPE="v5litepod-8", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,), devices=devices)
PROGRAMS = {
    "cast": lambda s: s.astype(jnp.bfloat16).astype(jnp.float32),
    "cast behind a barrier": lambda s: (
        jax.lax.optimization_barrier(s).astype(jnp.bfloat16).astype(jnp.float32)
    ),
    "not cast": lambda s: s,
}


def total(after, xs):
    def scatter(x):
        return after(jax.lax.psum_scatter(x.T @ x, "x", scatter_dimension=1, tiled=True))

    def add(t, x):
        return (
            t + jax.shard_map(scatter, in_specs=P("x"), out_specs=P(None, "x"), check_vma=False)(x),
            None,
        )

    return jax.lax.scan(add, jnp.zeros((128, 128)), xs)[0]


for name, after in PROGRAMS.items():
    with jax.set_mesh(mesh):
        xs = jax.ShapeDtypeStruct(
            (4, 64, 128), jnp.float32, sharding=NamedSharding(mesh, P(None, "x"))
        )
        try:
            text = jax.jit(total, static_argnums=0).lower(after, xs).compile().as_text()
            body = text[: text.index("ENTRY")]
            print(
                f"{name}: compiles, the scatter is {'in' if 'reduce-scatter(' in body else 'out of'} the loop"
            )
        except jax.errors.JaxRuntimeError as error:
            print(f"{name}: {error}")
