"""Runs commands as a pod does: on a read-only root, with a writable /tmp and /dev/shm, as user
1000.

The root is that of a built image, where RAYMILL_IMAGE_ROOT names a folder with one (`buildah
mount`). Otherwise it is this machine's with what the Dockerfile's steps make: its code, copied, and
its kernels, compiled, at /mnt.
"""

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.time_limits import limit_s

ROOT_VARIABLE = "RAYMILL_IMAGE_ROOT"


@dataclass(frozen=True)
class ImageRoot:
    """Runs scripts: `mounts` are shell commands in a mount namespace, after which the code is found
    at `app`."""

    mounts: str
    enter: str
    python: str
    app: str
    environment: dict[str, str]

    def run(
        self, script: str, files: Path, *, timeout_s: float
    ) -> subprocess.CompletedProcess[str]:
        """Runs a shell script in /tmp as a pod's user, without capabilities. It finds `files` at
        /mnt/files."""
        inside = f"cd /tmp && {script}"
        enter = f"{self.enter} sh -c {shlex.quote(inside)}"
        whole = f"set -e; FILES={shlex.quote(str(files))}; {self.mounts}\nexec {enter}"
        return subprocess.run(
            [
                "unshare",
                "--mount",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
                "sh",
                "-c",
                whole,
            ],
            env={"PATH": os.environ["PATH"]} | self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=limit_s(timeout_s),
        )


_AS_USER = "setpriv --reuid 1000 --regid 1000 --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all"
_VOLUMES = "mount -t tmpfs -o mode=1777 tmpfs {root}/tmp; mount -t tmpfs -o mode=1777 tmpfs {root}/dev/shm;"


def built_root(root: Path) -> ImageRoot:
    """Returns the root of a built image."""
    mounts = f"R={shlex.quote(str(root))}; mount --bind $R $R; mkdir -p $R/mnt/files; mount --bind $FILES $R/mnt/files;"
    mounts += "mount --rbind /dev $R/dev; mount -t proc proc $R/proc; mount --rbind /sys $R/sys;"
    mounts += f"{_VOLUMES.format(root='$R')} mount -o remount,bind,ro $R"
    environment = {
        "HOME": "/tmp",
        "PYTHONPATH": "/app",
        "RAYMILL_KERNELS": "/opt/kernels",
        "USER": "raymill",
    }
    environment |= {
        "PATH": "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return ImageRoot(mounts, f"chroot $R {_AS_USER}", "python", "/app", environment)


def followed_root(made: Path) -> ImageRoot:
    """Returns this machine's root with what `made` holds: `app` and `kernels`."""
    prefix = Path(sys.base_prefix)
    mounts = "mount -t tmpfs tmpfs /mnt; mkdir /mnt/app /mnt/kernels /mnt/base /mnt/files;"
    mounts += f"mount --bind {made}/app /mnt/app; mount --bind {made}/kernels /mnt/kernels;"
    mounts += f"mount --bind $FILES /mnt/files; mount --bind {prefix} /mnt/base;"
    closed = [folder for folder in reversed(prefix.parents) if not folder.stat().st_mode & 0o001]
    if closed:  # Python lies in a home that others may not enter
        mounts += f"mount -t tmpfs -o mode=755 tmpfs {closed[0]}; mkdir -p {prefix}; mount --bind /mnt/base {prefix};"
        mounts += f"mount -o remount,ro {closed[0]};"
    volumes = _VOLUMES.format(root="")
    packages = sys.prefix
    if Path(packages).is_relative_to("/tmp"):  # the new /tmp would hide this checkout's
        mounts += f"mkdir /mnt/packages; mount --bind {packages} /mnt/packages;"
        volumes += f"mkdir -p {packages}; mount --bind /mnt/packages {packages};"
    mounts += f"{volumes} mount -o remount,ro /mnt; mount -o remount,bind,ro /"
    environment = {
        "HOME": "/tmp",
        "PYTHONPATH": "/mnt/app",
        "RAYMILL_KERNELS": "/mnt/kernels",
        "USER": "raymill",
    }
    environment |= {"CXX": "/no/compiler", "PYTHONDONTWRITEBYTECODE": "1"}
    return ImageRoot(mounts, _AS_USER, sys.executable, "/mnt/app", environment)


def image_root(made: Path, *, sources: list[Path]) -> ImageRoot:
    """Returns the built image's root, or this machine's with the steps followed: code copied and
    kernels compiled."""
    if root := os.environ.get(ROOT_VARIABLE):
        return built_root(Path(root))
    for source in sources:
        shutil.copytree(
            source, made / "app" / source.name, ignore=shutil.ignore_patterns("__pycache__", "k8s")
        )
    bake = [sys.executable, "-m", "model.kernels.native_library", "--bake", str(made / "kernels")]
    subprocess.run(
        bake, cwd=made / "app", check=True, env=os.environ | {"PYTHONPATH": str(made / "app")}
    )
    return followed_root(made)
