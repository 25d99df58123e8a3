#!/usr/bin/env python3
"""Is the installed package whole, and light? Run it with the Python that has the wheel, from a folder that is not the checkout.

ELSEWHERE$ .venv/bin/python CHECKOUT/tools/check_installed.py CHECKOUT
"""
import importlib
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

NAME = "pli"


def plain(requirement: str) -> str:
    "The bare name in a requirement, as package indexes compare it."
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def import_fault(module: str, tooling: set[str]) -> str | None:
    "Why a module cannot be imported; that it needs notebook tooling, which the dev extra brings, is no fault."
    try: importlib.import_module(module)
    except ModuleNotFoundError as error:
        if plain(error.name.partition(".")[0]) not in tooling: return f"{module} needs {error.name}, which nothing requires"
        print(f"{module} needs {error.name}, which comes with the dev extra")
    return None


def main(checkout: Path):
    requires = metadata.requires(NAME)
    dev = {plain(line) for line in requires if re.search(r"extra\s*==\s*['\"]dev['\"]", line)} | {"ipython", "notebook"}
    always = {plain(line) for line in requires if "extra" not in line}
    there = {plain(found.metadata["Name"]) for found in metadata.distributions()}
    faults = [f"{name} is notebook tooling, but is required" for name in sorted(always & dev)]
    faults += [f"{name} is notebook tooling, but is installed: find out what pulls it in" for name in sorted((there & dev) - always)]

    package = importlib.import_module(NAME)
    if not Path(package.__file__).is_relative_to(sys.prefix): sys.exit(f"this is not the installed package: {package.__file__}")
    if "torch" in sys.modules: faults.append(f"`import {NAME}` alone must not import torch")

    listed = subprocess.run(["git", "ls-files", NAME], cwd=checkout, check=True, capture_output=True, text=True).stdout.splitlines()
    installed = {path.as_posix() for path in metadata.files(NAME)}
    faults += [f"{name} is in git but not in the wheel: name it in setup.py and MANIFEST.in" for name in listed if name not in installed]
    modules = [name.removesuffix(".py").replace("/", ".") for name in listed if name.endswith(".py") and "__init__" not in name]
    faults += filter(None, (import_fault(module, dev) for module in modules))
    if faults: sys.exit("\n".join(faults))
    print(f"{len(listed)} files and {len(modules)} modules installed, {len(there)} packages, no notebook tooling")


if __name__ == "__main__": main(Path(sys.argv[1]))
