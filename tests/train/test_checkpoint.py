"""Checkpoints round-trip bit for bit on any mesh, and nothing damaged is ever returned as good.

The failures are real ones: bytes flipped on disk, a full file system, processes killed while they
write.
"""

import contextlib
import inspect
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mor_jax.errors import CheckpointError
from mor_jax.train import digests, orbax
from mor_jax.train.checkpoint import Checkpointer, load_meta, restore_params

REPO = Path(__file__).resolve().parents[2]
META = {"config": {"name": "run", "lr": 3e-3, "paths": ["a", "é"]}, "tokenizer": "{}" * 1000}


def make_state(seed, width=16):
    key = jax.random.key(seed)
    params = {
        "core": {
            "w": jax.random.normal(key, (width, 32)),
            "b": jax.random.normal(key, (32,), jnp.bfloat16),
        },
        "embed": jax.random.normal(key, (24, width)),
    }
    opt = optax.adamw(1e-3)
    opt_state = opt.update(params, opt.init(params), params)[1]  # moments that are not zero
    return {"params": params, "opt": opt_state, "step": jnp.int32(seed), "key": key}


PRELUDE = (
    "import sys, jax, jax.numpy as jnp, optax\nfrom mor_jax.errors import CheckpointError\n"
    "from mor_jax.train.checkpoint import *\n" + inspect.getsource(make_state)
)


def bits(tree):
    return [
        np.asarray(
            jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        ).tobytes()
        for x in jax.tree.leaves(tree)
    ]


def abstract(tree):
    return jax.eval_shape(lambda: tree)


def run(code, *args, devices=0, wait=True):
    """Run code in a fresh interpreter, after PRELUDE."""
    code = PRELUDE + textwrap.dedent(code)
    env = {**os.environ, "PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu"}
    env.pop("XLA_FLAGS", None)
    if devices:
        env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    child = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if not wait:
        return child
    out, err = child.communicate(timeout=120)
    return child.returncode, out, err


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with steps 1 and 2; tests that change it work on a copy."""
    directory = tmp_path_factory.mktemp("saved")
    with Checkpointer(directory) as ckpt:
        ckpt.save(1, make_state(1), {**META, "n": 1})
        ckpt.save(2, make_state(2), {**META, "n": 2})
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_a_save_has_few_bytes_on_their_way_at_once(tmp_path, monkeypatch):
    """Else its writers hold a copy of the whole state, which is twice the memory of a model."""
    from orbax.checkpoint._src.serialization import limits

    held, most = 0, 0
    wait, release = (
        getattr(limits.LimitInFlightBytes, name) for name in ("wait_for_bytes", "release_bytes")
    )

    async def waited(self, size):
        nonlocal held, most
        await wait(self, size)
        held += size
        most = max(most, held)

    async def released(self, size):
        nonlocal held
        held -= size
        await release(self, size)

    monkeypatch.setattr(limits.LimitInFlightBytes, "wait_for_bytes", waited)
    monkeypatch.setattr(limits.LimitInFlightBytes, "release_bytes", released)
    monkeypatch.setattr(orbax, "IN_FLIGHT", 300_000)
    state = {str(i): jnp.full((100, 250), i, jnp.float32) for i in range(12)}  # 100,000 bytes each
    state["large"] = jnp.arange(200_000, dtype=jnp.float32)  # more than the bound alone
    for name, of, bound in (("small", state.copy(), 300_000), ("large", state, 800_001)):
        if name == "small":
            del of["large"]
        held = most = 0
        with Checkpointer(tmp_path / name, async_save=False) as to:
            to.save(1, of, META)
        assert 100_000 <= most <= bound
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), of)
        with Checkpointer(tmp_path / name) as again:
            assert bits(again.restore_latest(abstract).state) == bits(of)


def test_round_trip_is_bit_exact_and_keeps_the_containers(saved):
    with Checkpointer(saved) as ckpt:
        found = ckpt.restore_latest(abstract(make_state(0)))
    assert (found.step, found.meta, found.skipped) == (2, {**META, "n": 2}, {})
    assert jax.tree.structure(found.state) == jax.tree.structure(make_state(2))
    assert bits(found.state) == bits(make_state(2))
    assert type(found.state["opt"][0]).__name__ == "ScaleByAdamState"


def test_a_survey_round_trips_and_an_older_save_begins_it_at_zero(saved, tmp_path):
    def surveyed(seed):
        """As `make_state`, with a survey among the parameters and, as the optimiser does, in its
        moments."""
        state = make_state(seed)

        def with_survey(tree):
            return tree | {"router": {"w": tree["core"]["w"], "survey": jnp.full((3, 8), 0.5)}}

        params = with_survey(state["params"])
        return state | {"params": params, "opt": optax.adamw(1e-3).init(params)}

    with Checkpointer(tmp_path / "new") as ckpt:
        ckpt.save(1, surveyed(1), {})
        assert bits(ckpt.restore_latest(abstract(surveyed(0))).state) == bits(surveyed(1))

    bare = surveyed(2)

    def drop(tree):
        return tree | {"router": {"w": tree["router"]["w"]}}

    bare |= {"params": drop(bare["params"]), "opt": optax.adamw(1e-3).init(drop(bare["params"]))}
    with Checkpointer(tmp_path / "old") as ckpt:
        ckpt.save(1, bare, {})
        found = ckpt.restore_latest(abstract(surveyed(0))).state
    assert jax.tree.structure(found) == jax.tree.structure(surveyed(0))
    assert (np.asarray(found["params"]["router"]["survey"]) == 0).all()
    assert bits(found["params"]["core"]) == bits(bare["params"]["core"])
    params, _ = restore_params(tmp_path / "old", abstract(surveyed(0)["params"]))
    assert params["router"]["survey"].shape == (3, 8) and bits(params["router"]["w"]) == bits(
        bare["params"]["router"]["w"]
    )
    with pytest.raises(CheckpointError, match="params/router/w is not in the checkpoint"):
        restore_params(saved, abstract(surveyed(0)["params"]))  # only the survey may be missing


def test_keep_steps_and_saving_the_newest_again(tmp_path):
    with Checkpointer(tmp_path / "new" / "dir", keep=2) as ckpt:
        assert ckpt.steps() == [] and ckpt.restore_latest(abstract(make_state(0))) is None
        for step in (1, 2, 3):
            ckpt.save(step, make_state(step), {})
        ckpt.save(3, make_state(3), {})
        ckpt.wait()
        assert ckpt.steps() == [2, 3]
        with pytest.raises(CheckpointError, match="already holds step 3"):
            ckpt.save(1, make_state(1), {})
        ckpt.check()


def test_donating_the_state_right_after_save_changes_nothing(tmp_path):
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    state = {"params": {"w": jax.random.normal(jax.random.key(0), (512, 512))}}
    before = bits(state)
    template = abstract(state)
    with Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, state, {})
        for _ in range(20):
            state = step(state)
        jax.block_until_ready(state)
        assert bits(ckpt.restore_latest(template).state) == before


def test_params_alone_cast_and_chosen_by_step(saved):
    want = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), abstract(make_state(0))["params"]
    )
    params, step = restore_params(saved, want)
    assert step == 2
    assert bits(params) == bits(
        jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_state(2)["params"])
    )
    params, step = restore_params(saved, abstract(make_state(0))["params"], step=1)
    assert step == 1 and bits(params) == bits(make_state(1)["params"])
    assert load_meta(saved) == (2, {**META, "n": 2}) and load_meta(saved, 1)[1]["n"] == 1


def test_a_config_that_does_not_fit_is_named_and_moves_nothing(saved):
    other = abstract(make_state(0, width=8))
    message = r"step 2 .* does not fit the config: .*core/w is float32\[16, 32\] in the checkpoint, float32\[8, 32\] is expected"
    with pytest.raises(CheckpointError, match=message):
        Checkpointer(saved).restore_latest(dict(other, opt=abstract(make_state(0))["opt"]))
    with pytest.raises(CheckpointError, match=message):
        restore_params(saved, other["params"])
    with pytest.raises(CheckpointError, match="params/embed is in the checkpoint but not expected"):
        restore_params(saved, {"core": abstract(make_state(0))["params"]["core"]})
    with pytest.raises(CheckpointError, match="params/more is not in the checkpoint"):
        restore_params(
            saved,
            {**abstract(make_state(0))["params"], "more": jax.ShapeDtypeStruct((1,), jnp.float32)},
        )
    assert sorted(os.listdir(saved)) == ["1", "2"]


def test_another_mesh_restores_the_same_bits_and_the_same_digests(saved):
    code = """
    import json, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from mor_jax.train import digests
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    def on_mesh(x):
        spec = P("fsdp", "tensor") if x.ndim == 2 else P(("data", "tensor")) if x.ndim == 1 else P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
    template = jax.tree.map(on_mesh, jax.eval_shape(lambda: make_state(0)))
    found = Checkpointer(sys.argv[1]).restore_latest(template)
    assert found.state["params"]["core"]["w"].sharding.spec == P("fsdp", "tensor")
    with Checkpointer(sys.argv[2]) as ckpt:
        ckpt.save(2, found.state, found.meta)
    print(json.dumps(digests.table(found.state)))
    """
    back = saved.parent / "from_mesh"
    status, out, err = run(code, saved, back, devices=8)
    assert status == 0, err
    assert json.loads(out) == digests.table(make_state(2))
    assert bits(Checkpointer(back).restore_latest(abstract(make_state(0))).state) == bits(
        make_state(2)
    )


@pytest.mark.parametrize(
    "dtype",
    ["float32", "bfloat16", "float16", "float8_e4m3fn", "int32", "uint8", "bool", "complex64"],
)
def test_digest_sees_every_bit_and_every_place(dtype):
    x = np.asarray(jnp.asarray(np.random.default_rng(0).integers(0, 2, (5, 7)), dtype))
    digest = jax.jit(digests.digest)
    base = digest(x).tolist()
    for bit in range(0, x.nbytes * 8, 1 if dtype != "bool" else 8):
        damaged = bytearray(x.tobytes())
        damaged[bit // 8] ^= 1 << bit % 8
        assert digest(np.frombuffer(bytes(damaged), x.dtype).reshape(x.shape)).tolist() != base
    assert digest(x[::-1]).tolist() != base
    # the place is the flat index; the shape is recorded apart
    assert digest(x.reshape(7, 5)).tolist() == base


def test_digest_makes_no_copy():
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    assert jax.jit(digests.digest).lower(x).compile().memory_analysis().temp_size_in_bytes < 4096


def files_of(step):
    return sorted(str(p.relative_to(step)) for p in step.rglob("*") if p.is_file())


def damage(path, how):
    data = path.read_bytes()
    if how == "delete":
        path.unlink()
    elif how == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif how == "garbage":
        path.write_bytes(random.Random(0).randbytes(len(data)))
    else:  # the position of the byte to flip, as a share of the file
        at = min(int(float(how) * len(data)), len(data) - 1)
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])


@pytest.mark.parametrize("how", ["delete", "truncate", "garbage", "0", "0.3", "0.5", "0.8", "1"])
def test_damage_to_any_file_is_found_or_harmless(saved, tmp_path, how):
    template, good = abstract(make_state(0)), {n: bits(make_state(n)) for n in (1, 2)}
    found_out = 0
    for name in files_of(saved / "2"):
        directory = tmp_path / "copy"
        shutil.copytree(saved, directory)
        damage(directory / "2" / name, how)
        found = Checkpointer(directory).restore_latest(template)
        assert bits(found.state) == good[found.step] and found.meta["n"] == found.step, name
        assert sorted(os.listdir(directory)) == (
            ["1", "2"] if found.step == 2 else ["1", "2.damaged"]
        )
        found_out += found.step == 1
        shutil.rmtree(directory)
    assert found_out >= (2 if how in ("delete", "truncate", "garbage") else 1)


def test_the_damaged_leaf_is_named(saved, monkeypatch):
    table = digests.table

    def lie(tree):
        return {
            k: [*v[:2], "0" * 16] if k == "params/core/w" else v for k, v in table(tree).items()
        }

    monkeypatch.setattr(digests, "table", lie)
    with pytest.raises(
        CheckpointError, match=r"step 2 .* damaged: the values of params/core/w .* --step=1"
    ):
        restore_params(saved, abstract(make_state(0))["params"])


def test_skipped_steps_can_be_saved_again(copy, caplog):
    shutil.rmtree(copy / "2" / "state")
    (copy / "3").mkdir()
    (copy / "4.orbax-checkpoint-tmp").mkdir()
    (copy / "2.damaged").mkdir()
    with pytest.raises(CheckpointError, match=r"step 3 .*damaged.*--step=2"):
        load_meta(copy)
    with Checkpointer(copy) as ckpt:
        found = ckpt.restore_latest(abstract(make_state(0)))
        assert found.step == 1 and list(found.skipped) == [3, 2] and ckpt.steps() == [1]
        assert "step 3" in caplog.text and "step 2" in caplog.text
        ckpt.save(2, make_state(2), META)
        ckpt.save(3, make_state(3), META)
    assert [n for n in sorted(os.listdir(copy)) if "-" not in n] == [
        "1",
        "2",
        "2.damaged",
        "3",
        "3.damaged",
    ]
    assert not list(copy.glob("*tmp"))
    assert bits(Checkpointer(copy).restore_latest(abstract(make_state(0))).state) == bits(
        make_state(3)
    )


def test_if_none_verifies_nothing_is_moved(copy):
    for step in (1, 2):
        (copy / str(step) / "meta" / "metadata").write_text("{}")
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint in .* step 2: .* step 1: "):
        Checkpointer(copy).restore_latest(abstract(make_state(0)))
    assert sorted(os.listdir(copy)) == ["1", "2"]
    with pytest.raises(CheckpointError, match=r"step 2 .* is damaged"):
        load_meta(copy)


def test_directories_that_cannot_be_used(tmp_path, saved):
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "below", "/proc/none"):
        with pytest.raises(CheckpointError, match="cannot write checkpoints"):
            Checkpointer(bad)
    for bad in (tmp_path / "file", tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointError, match=r"holds no checkpoint|is not a directory"):
            load_meta(bad)
    with pytest.raises(CheckpointError, match="no checkpoint of step 7; it has steps 1, 2"):
        restore_params(saved, {}, step=7)


@pytest.fixture
def small_disk(tmp_path):
    """(directory, limit): a file system of 8 MB, or where none can be mounted, a limit on the size
    of files."""
    mount = tmp_path / "disk"
    mount.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "none", mount], capture_output=True
    ).returncode:
        yield mount, True
        return
    yield mount, False
    subprocess.run(["umount", "-l", mount], check=True)


@pytest.mark.parametrize("mode", ["async", "sync", "abandoned"])
def test_full_disk_is_one_message_and_harms_nothing(small_disk, mode):
    code = """
    import resource, signal, time
    directory, mode, limited = sys.argv[1:]
    ckpt = Checkpointer(directory, async_save=mode != "sync")
    try:
        for step in range(1, 50):
            if step == 3 and limited == "True":
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
            ckpt.save(step, make_state(step, width=6000), {"tokenizer": "x" * 10_000})
            for _ in range(20):
                ckpt.check()
                time.sleep(0.01)
    except CheckpointError as e:
        print(e, file=sys.stderr)
        if mode != "abandoned":
            ckpt.close()
        sys.exit(2)
    """
    directory, limited = small_disk
    start = time.monotonic()
    status, out, err = run(code, directory / "run", mode, limited)
    assert (status, out) == (2, "")
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    reason = "File too large" if limited else "No space left on device"
    assert (
        lines[0].startswith("could not save step ")
        and f"{directory / 'run'}: {reason}. Earlier checkpoints are intact" in lines[0]
    )
    assert time.monotonic() - start < 30
    kept = sorted(int(n) for n in os.listdir(directory / "run"))
    assert kept and f"(steps {', '.join(map(str, kept))})" in lines[0]
    template = abstract(make_state(0, width=6000))
    found = Checkpointer(directory / "run").restore_latest(template)
    assert found.step == kept[-1] and bits(found.state) == bits(make_state(found.step, width=6000))


def test_killed_while_saving_resumes_from_an_earlier_step(tmp_path):
    code = """
    template = jax.eval_shape(lambda: make_state(0, width=3000))
    with Checkpointer(sys.argv[1], keep=2) as ckpt:
        found = ckpt.restore_latest(template)
        step = found.step if found else 0
        print("at", step, found.skipped if found else {}, flush=True)
        while True:
            step += 1
            ckpt.save(step, make_state(step, width=3000), {"step": step})
            print("saving", step, flush=True)
    """
    rng = random.Random(time.time_ns())
    begun = durable = 0
    for _ in range(3):
        child = run(code, tmp_path / "run", wait=False)
        with contextlib.closing(child.stdout) as out:
            at, skipped = out.readline().removeprefix("at ").split(" ", 1)
            assert skipped == "{}\n" and durable <= int(at) <= begun
            for line in out:
                begun = int(line.split()[1])
                durable = max(durable, begun - 1)  # `save` waits for the one before
                if begun >= int(at) + 2:
                    break
            time.sleep(rng.uniform(0, 0.15))
            child.send_signal(signal.SIGKILL)
            begun = max([begun, *(int(line.split()[1]) for line in out if line.endswith("\n"))]) + 1
        child.stderr.close()
        child.wait()
    found = Checkpointer(tmp_path / "run").restore_latest(abstract(make_state(0, width=3000)))
    assert durable <= found.step <= begun and found.skipped == {}
    assert bits(found.state) == bits(make_state(found.step, width=3000)) and found.meta == {
        "step": found.step
    }


def test_an_error_elsewhere_is_not_hidden_and_the_save_is_finished(tmp_path):
    with pytest.raises(ZeroDivisionError), Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, make_state(1), {})
        _ = 1 / 0
    assert load_meta(tmp_path) == (1, {})


def test_import_does_not_load_orbax_and_other_loggers_still_speak(saved):
    code = """
    assert "orbax.checkpoint" not in sys.modules
    Checkpointer(sys.argv[1]).restore_latest(jax.eval_shape(lambda: make_state(0)))
    from absl import logging
    logging.warning("still here")
    """
    status, out, err = run(code, saved)
    assert status == 0 and out == "" and len(err.splitlines()) == 1 and "still here" in err, err


def test_a_damaged_step_is_one_line_on_the_terminal(copy):
    for path in (copy / "2" / "state").rglob("d/*"):
        damage(path, "garbage")
    code = """
    found = Checkpointer(sys.argv[1]).restore_latest(jax.eval_shape(lambda: make_state(0)))
    assert found.step == 1
    """
    status, out, err = run(code, copy)
    assert (status, out) == (0, "") and len(err.splitlines()) == 1, err
    assert (
        f"the checkpoint of step 2 in {copy} is damaged (" in err and "now called 2.damaged" in err
    )


def test_two_processes_save_agree_and_skip_damage(tmp_path):
    code = """
    import json, os, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    directory, rank, port = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
    where = lambda x: NamedSharding(mesh, P("fsdp") if x.ndim else P())
    shapes = jax.eval_shape(lambda: make_state(0))
    make = jax.jit(make_state, static_argnums=0, out_shardings=jax.tree.map(where, shapes))
    with Checkpointer(directory) as ckpt:
        for step in (1, 2):
            ckpt.save(step, make(step), {"n": step})
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where(x)), shapes)
    if rank == 0:
        os.remove(os.path.join(directory, "2", "state", "manifest.ocdbt"))
    jax.experimental.multihost_utils.sync_global_devices("damaged")
    with Checkpointer(directory) as ckpt:
        found = ckpt.restore_latest(template)
        assert found.step == 1 and list(found.skipped) == [2], found
        ckpt.save(2, make(2), {"n": 2})
    """
    code = "import jax.experimental.multihost_utils\n" + textwrap.dedent(code)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = [run(code, tmp_path / "run", rank, port, devices=2, wait=False) for rank in (0, 1)]
    for child in children:
        _, err = child.communicate(timeout=100)
        assert child.returncode == 0, err
    found = Checkpointer(tmp_path / "run").restore_latest(abstract(make_state(0)))
    assert found.step == 2 and sorted(os.listdir(tmp_path / "run")) == ["1", "2", "2.damaged"]
    for got, want in zip(jax.tree.leaves(found.state), jax.tree.leaves(make_state(2)), strict=True):
        if not jnp.issubdtype(got.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(np.float32(got), np.float32(want), rtol=1e-5)
