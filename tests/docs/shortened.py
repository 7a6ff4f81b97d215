"""What `python`, `pip` and `make` are in a page's bash blocks: the commands as written, made short.

A page says what a user would type; this file adds what keeps it to seconds: two steps of training, a handful of
tokens, a server in the background. `pip` and `make` install and build nothing; they check what they are asked for.
Run by the shims that tests/docs/pages.py puts first on the PATH.
"""

import math
import os
import re
import subprocess
import sys
import time
import tomllib
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMPILING = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"  # as tests/conftest.py does
)
STEPS = {"train.num_steps": 2, "train.log_every": 1, "train.eval_batches": 1, "train.checkpoint_every": 2}


def python(args: list[str]) -> list[str]:
    """The arguments of `python` made short."""
    if args[:1] != ["-m"]:
        return args
    module, rest = args[1], args[2:]
    if module == "train" and any(arg.startswith("--gin_") for arg in rest):
        rest += [f"--gin_param={key}={value}" for key, value in shorter_run(" ".join(rest)).items()]
    elif module == "train.verify":
        rest = ["4" if arg == "360" else arg for arg in rest]  # the last step of tests/docs/stand_ins.py
    elif module == "train.data":
        rest = ["my/texts" if arg == "stdlib" else arg for arg in rest]
    simulate(module, rest)
    if module == "inference" and {"--prompt", "summarize"} & set(rest) and "--dry-run" not in rest:
        rest += ["--max-new-tokens", "6"]
    elif module == "modelzoo.convert" and "mesh-transformer-jax" in rest and "--config" not in rest:
        rest += ["--config", "tiny-gptj.json"]
    elif module in ("train.plan", "inference.plan"):
        # Where libtpu is installed, the compiler would take minutes.
        if "--compile" in rest:
            del rest[rest.index("--compile") : rest.index("--compile") + 2]
        rest += ["--analytic"] * ("--analytic" not in rest)
    elif module == "inference.serve":
        rest += ["--port", os.environ["DOCS_PORT"], "--max-length", "64", "--rows", "2"]
    return ["-m", module, *rest]


def simulate(module: str, args: list[str]) -> None:
    """As many devices as a command's mesh takes, unless the page says how many there are."""
    command = " ".join(args)
    sizes: list[str] = []
    if module in ("train", "train.verify"):
        sizes = re.findall(r"mesh\.\w+=(\d+)", command) or ["8"] * ("parallel/" in command)
    elif module in ("inference", "inference.evaluate", "inference.serve") and "--mesh" in args:
        sizes = [] if "--dry-run" in args else re.findall(r"=(\d+)", args[args.index("--mesh") + 1])
    flags = os.environ.get("XLA_FLAGS", "")
    if sizes and COMPILING in flags:
        kept = [flag for flag in flags.split() if "device_count" not in flag]
        count = math.prod(map(int, sizes))
        os.environ["XLA_FLAGS"] = " ".join([*kept, f"--xla_force_host_platform_device_count={count}"])


def shorter_run(command: str) -> dict[str, object]:
    """The settings that make a command of `python -m train` short."""
    settings: dict[str, object] = dict(STEPS)
    if "train.profile_steps" in command:
        settings["train.num_steps"] = max(map(int, re.findall(r"\d+", command.split("profile_steps", 1)[1])))
    for schedule in re.findall(r"(\w+)\.warmup_steps=", command):
        settings[f"{schedule}.warmup_steps"] = 1
    if re.search(r"quickstart|ablations/|pretrain/", command) and not re.search(
        r"data\.(path|mixture)", command
    ):
        settings["data.path"] = "'my/texts'"
    return settings


def serve(args: list[str]) -> int:
    """Starts a server and comes back when it answers; whoever runs the page ends it."""
    log = Path("server.log")
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, *args], stdout=file, stderr=file, start_new_session=True)
    Path("server.pid").write_text(str(process.pid))
    for _ in range(600):
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{os.environ['DOCS_PORT']}/health", timeout=5)
            return 0
        except OSError:
            time.sleep(0.2)
    print(log.read_text(), file=sys.stderr)
    return 1


def pip(args: list[str]) -> int:
    """Checks that the extras of flaxtron that are asked for exist."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = {extra for arg in args for found in re.findall(r"\[(.+)\]", arg) for extra in found.split(",")}
    ours = any(re.match(r"(flaxtron|\.)", arg) for arg in args)
    unknown = asked - set(project["optional-dependencies"]) if ours else set()
    if unknown or args[:1] != ["install"]:
        print(f"pip {' '.join(args)}: no such extra {', '.join(sorted(unknown))}", file=sys.stderr)
        return 1
    return 0


def main(tool: str, args: list[str]) -> int:
    """Does what the shim called `tool` is asked for."""
    if tool == "pip":
        return pip(args)
    if tool == "make":
        return subprocess.run(
            ["/usr/bin/env", "-i", "PATH=/usr/bin:/bin", "make", "-n", *args],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
        ).returncode
    args = python(args)
    if args[:2] == ["-m", "inference.serve"] and "--help" not in args:
        return serve(args)
    if COMPILING.split()[0] not in os.environ.get("XLA_FLAGS", ""):  # the page has flags of its own
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {COMPILING}".strip()
    os.execv(sys.executable, [sys.executable, *args])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
