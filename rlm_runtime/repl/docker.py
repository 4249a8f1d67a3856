"""The worker in a Docker container: no network, read-only, no capabilities, bounded memory. It is
spoken to over the standard streams of `docker run`, and still locks itself in as far as the
container lets it."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from pathlib import Path

from rlm_runtime.errors import SandboxError, UsageError
from rlm_runtime.repl import sandbox
from rlm_runtime.repl.base import Limits
from rlm_runtime.repl.host import HostedEnvironment
from rlm_runtime.repl.hosted import WORKER
from rlm_runtime.repl.packages import Allowed
from rlm_runtime.repl.process import Launch, Process
from rlm_runtime.repl.sandbox import SandboxPolicy
from rlm_runtime.repl.workdir import WorkDir

IMAGE = "python:3.12-slim"
ROOT = "/rlm"  # of everything of ours in the container
CLIENT_NEEDS = (
    "PATH",
    "HOME",
    "SSH_AUTH_SOCK",
    "XDG_RUNTIME_DIR",
    "XDG_CONFIG_HOME",
)  # the docker command, not the worker
OVERHEAD = 256 << 20  # bytes of memory besides what a cell may use


class DockerEnvironment(HostedEnvironment):
    """`image`: one with Python 3.11 or newer as `python`. `packages`: top-level names of packages
    installed in it.

    The container does what Landlock, seccomp and dropped privileges do elsewhere, so these are
    reported but not required.
    """

    kind = "docker"
    required = ("container", *sandbox.CONTAINED)
    overlap = False
    scrub = True  # an image brings variables of its own

    def __init__(
        self,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        policy: SandboxPolicy = SandboxPolicy(),  # noqa: B008
        packages: tuple[str, ...] = (),
        *,
        image: str = IMAGE,
        docker: str = "docker",
        temp_dir: str | None = None,
    ):
        super().__init__(limits, policy, (), temp_dir=temp_dir)
        wrong = [name for name in packages if not re.fullmatch(r"[A-Za-z_]\w*", name)]
        if wrong:
            raise UsageError(
                f"packages: {wrong[0]!r} is no name that can be imported; in an image those are meant."
            )
        self._packages = Allowed(tops=tuple(packages))
        self._image, self._docker, self._name = image, docker, ""

    def _launch(self, folder: WorkDir) -> Launch:
        docker = shutil.which(self._docker)
        if docker is None:
            raise SandboxError(
                f"environment='docker' needs the program {self._docker}, which is not on PATH. Install Docker Engine "
                "(https://docs.docker.com/engine/install/), or use environment='local', which needs no container."
            )
        self._name = f"rlm-{secrets.token_hex(8)}"
        argv = [os.path.abspath(docker), *self.arguments(folder)]
        env = {n: os.environ[n] for n in os.environ if n in CLIENT_NEEDS or n.startswith("DOCKER_")}
        env["PATH"] = sandbox.fixed_folders(env.get("PATH", ""))
        return Launch(lambda _: argv, env, stdio=True, group=False)

    def arguments(self, folder: WorkDir) -> list[str]:
        """Of the docker command."""
        limits, owner = self.limits, f"{os.getuid()}:{os.getgid()}"
        memory = limits.memory + OVERHEAD + sum(p.memory for p in self._payloads.values())
        tmpfs = f"{ROOT}/scratch:rw,nosuid,nodev,noexec,size={limits.scratch},nr_inodes={self.policy.files}"
        args = [  # it starts in the scratch, which is as new as the container
            "run",
            "--rm",
            "--interactive",
            "--name",
            self._name,
            "--network",
            "none",
            "--ipc",
            "none",
            "--read-only",
            "--cap-drop",
            "ALL",
            "--security-opt",
            "no-new-privileges",
            "--pids-limit",
            str(self.policy.threads),
            "--memory",
            str(memory),
            "--memory-swap",
            str(memory),
            "--log-driver",
            "none",
            "--user",
            owner,
            "--tmpfs",
            f"{tmpfs},mode=0700,uid={os.getuid()},gid={os.getgid()}",
            "--workdir",
            f"{ROOT}/scratch",
        ]
        mounts = {
            str(WORKER): f"{ROOT}/worker",
            str(folder.inbox): f"{ROOT}/inbox",
            str(folder.canary): f"{ROOT}/canary",
        }
        for payload in self._payloads.values():
            mounts |= {
                str(path): self._inside(path)
                for path in payload.paths
                if not path.is_relative_to(folder.root)
            }
        for source, target in mounts.items():
            args += ["--mount", _mount(source, target) + ",readonly"]
        args += ["--mount", _mount(str(folder.said), f"{ROOT}/said")]
        for name, value in sandbox.ENVIRONMENT.items():
            if name != "PATH":
                args += ["--env", f"{name}={value}"]
        args += ["--env", f"HOME={ROOT}/scratch", "--env", f"TMPDIR={ROOT}/scratch"]
        return [
            *args,
            "--entrypoint",
            "python",
            self._image,
            "-I",
            "-S",
            "-X",
            "utf8",
            f"{ROOT}/worker/main.py",
            "stdio",
        ]

    def _view(self, folder: WorkDir) -> dict[str, str]:
        return {name: f"{ROOT}/{name}" for name in ("scratch", "inbox", "canary", "said")}

    def _inside(self, path: Path) -> str:
        folder = self._resources.folder
        if folder is not None and path.is_relative_to(folder.root):
            return f"{ROOT}/{path.relative_to(folder.root)}"
        return f"{ROOT}/given{path}"

    def _environment(self, launch: Launch, view: dict[str, str]) -> list[str]:
        return [*sandbox.environment(view["scratch"])]

    def _packages_inside(self) -> dict[str, list[str]]:
        return self._packages.message() | {
            "sites": ["site-packages"] if self._packages.tops else []
        }

    def _outer_layers(self, process: Process) -> dict[str, str]:
        return {"container": f"active ({self._image}, no network, read-only, no capabilities)"}

    def _kill_command(self) -> list[str] | None:
        return [self._docker, "kill", self._name] if self._name else None

    def _explain(self, stderr: str) -> str:
        hint = ""
        if "daemon" in stderr or "docker.sock" in stderr:
            hint = " Start the Docker service, or set DOCKER_HOST; environment='local' needs no container."
        elif "No such image" in stderr or "pull" in stderr or "manifest" in stderr:
            hint = f" Get the image first (docker pull {self._image}), or name another: image=..."
        return super()._explain(stderr) + hint


def _mount(source: str, target: str) -> str:
    if "," in source or '"' in source:
        raise UsageError(
            f"environment='docker' cannot mount {source!r}: its path holds a comma or a quote."
        )
    return f"type=bind,source={source},target={target}"
