"""Whose libraries are loaded from a cache, and that nothing else is."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from unlearn_ext.errors import InputError
from unlearn_ext.native import building, library_cache, loading, recipes
from unlearn_ext.native.library_cache import MISSING, CacheDirectory, UnusableError, make_private, put
from unlearn_ext.ops import registration

CC = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
ROOT_USER = os.geteuid() == 0
SOMEBODY = 4321
NAME = "libtiny.so"

needs_compiler = pytest.mark.skipif(CC is None, reason="no C compiler")
needs_root = pytest.mark.skipif(not ROOT_USER, reason="only root can give files to another user")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("UNLEARN_EXT_CACHE", "XDG_CACHE_HOME", "UNLEARN_EXT_QUIET"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that every user can reach, which pytest's are not."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.fixture
def recipe(tmp_path: Path) -> recipes.Recipe:
    """A library of one function, compiled in an instant."""
    csrc = tmp_path / "csrc"
    csrc.mkdir()
    (csrc / "answer.c").write_text("int answer(void) { return 42; }\n")
    return recipes.Recipe(NAME, csrc, ("answer.c",), (CC or "cc",), ("-fPIC",), ("-shared",), prefix="tiny")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that says so when it is loaded: it makes the file that PLANTED names."""
    directory = tmp_path_factory.mktemp("planted")
    (directory / "planted.c").write_text(
        "#include <stdio.h>\n#include <stdlib.h>\n"
        '__attribute__((constructor)) static void run(void) { fclose(fopen(getenv("PLANTED"), "w")); }\n'
        "int answer(void) { return 13; }\n"
    )
    subprocess.run([CC, "-shared", "-fPIC", "planted.c", "-o", NAME], cwd=directory, check=True)
    return directory / NAME


def cached(recipe: recipes.Recipe, cache: Path) -> Path:
    return cache / recipe.key / recipe.file_name


def fill(library: Path, content: bytes, *, with_hash: bool = True) -> None:
    """A cache with this library, its hash beside it as a build leaves it."""
    library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    library.parent.parent.chmod(0o700)
    library.write_bytes(content)
    library.chmod(0o700)
    if with_hash:
        sums = library.with_name(library.name + ".sha256")
        sums.write_text(f"{sha256(content).hexdigest()}  {library.name}\n")
        sums.chmod(0o600)


def answer(recipe: recipes.Recipe, cache: Path) -> tuple[int, Path]:
    """What the library says that is loaded for the recipe, and where it was."""
    library = building.build_cached(recipe, cache)
    loading._load_library(library)
    return ctypes.CDLL(str(library)).answer(), library


def move_behind_a_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


# --- Planted libraries --------------------------------------------------------------------------------------

# What is wrong with it, and what is said of it; a hash that fits lies beside each.
OPEN_PLACES: dict[str, tuple[Callable[[Path], None], str]] = {
    "the cache is everybody's": (lambda library: library.parents[1].chmod(0o777), "can be written by others"),
    "the cache is a group's": (lambda library: library.parents[1].chmod(0o770), "can be written by others"),
    "the directory is everybody's": (lambda library: library.parent.chmod(0o777), "can be written by others"),
    "the directory is a link": (lambda library: move_behind_a_link(library.parent), "is a link"),
    "all above is everybody's": (lambda library: library.parents[2].chmod(0o777), "can be written by everybody"),
    "a sticky cache, the directory everybody's": (
        lambda library: (library.parents[1].chmod(0o1777), library.parent.chmod(0o777)),
        "can be written by others",
    ),
}
FOREIGN_PLACES: dict[str, tuple[Callable[[Path], None], str]] = {
    "the cache is another user's": (lambda library: os.chown(library.parents[1], SOMEBODY, -1), "uid 4321"),
    "the directory is another user's": (lambda library: os.chown(library.parent, SOMEBODY, -1), "uid 4321"),
    "a sticky cache of another user": (
        lambda library: (library.parents[1].chmod(0o1777), os.chown(library.parents[1], SOMEBODY, -1)),
        "uid 4321",
    ),
}
BAD_FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no hash": (lambda library: library.with_name(NAME + ".sha256").unlink(), "has no hash beside it"),
    "the library is everybody's": (lambda library: library.chmod(0o777), "can be written by others"),
    "the hash is a group's": (lambda library: library.with_name(NAME + ".sha256").chmod(0o660), "written by others"),
    "the library is a link": (move_behind_a_link, "is a link"),
    "the hash is a link": (lambda library: move_behind_a_link(library.with_name(NAME + ".sha256")), "is a link"),
}
FOREIGN_FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "the library is another user's": (
        lambda library: os.chown(library, SOMEBODY, -1),
        "uid 4321, and this process has 0)",
    ),
    "the hash is another user's": (
        lambda library: os.chown(library.with_name(NAME + ".sha256"), SOMEBODY, -1),
        "has a hash beside it that belongs to another user (uid 4321, and this process has 0)",
    ),
}


def each(cases: dict[str, tuple], *marks: pytest.MarkDecorator) -> list:
    return [pytest.param(*case, id=name, marks=marks) for name, case in cases.items()]


@needs_compiler
@pytest.mark.parametrize("spoil, reason", [*each(OPEN_PLACES), *each(FOREIGN_PLACES, needs_root)])
def test_a_place_where_others_can_put_libraries_is_not_used(
    spoil: Callable, reason: str, recipe, planted, tmp_path, monkeypatch, capfd
) -> None:
    monkeypatch.setenv("PLANTED", str(tmp_path / "ran"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    library = cached(recipe, tmp_path / "above" / "cache")
    fill(library, planted.read_bytes())
    spoil(library)
    value, loaded = answer(recipe, tmp_path / "above" / "cache")
    assert value == 42 and loaded != library
    assert not (tmp_path / "ran").exists()
    said = capfd.readouterr().err.splitlines()[0]
    assert reason in said and "for this process only" in said and "UNLEARN_EXT_CACHE" in said
    assert library.read_bytes() == planted.read_bytes(), "what stands in another's place is left as it is"


@needs_compiler
@pytest.mark.parametrize("spoil, reason", [*each(BAD_FILES), *each(FOREIGN_FILES, needs_root)])
def test_a_file_that_this_user_did_not_build_is_replaced(
    spoil: Callable, reason: str, recipe, planted, tmp_path, monkeypatch, capfd
) -> None:
    monkeypatch.setenv("PLANTED", str(tmp_path / "ran"))
    library = cached(recipe, tmp_path / "cache")
    fill(library, planted.read_bytes())
    spoil(library)
    assert answer(recipe, tmp_path / "cache") == (42, library)
    assert not (tmp_path / "ran").exists()
    assert f"{reason}; it is replaced" in capfd.readouterr().err
    assert not library.is_symlink() and mode(library) == 0o700
    building.build_cached(recipe, tmp_path / "cache")
    assert capfd.readouterr().err == "", "once"


@needs_compiler
def test_a_directory_that_takes_the_place_after_the_check_is_not_looked_at(
    recipe, planted, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("PLANTED", str(tmp_path / "ran"))
    library = building.build_cached(recipe, tmp_path / "cache")
    (tmp_path / "cache").rename(tmp_path / "aside")
    fill(library, planted.read_bytes())
    loading._load_library(library)
    assert not (tmp_path / "ran").exists()


@needs_compiler
def test_a_directory_that_takes_the_place_during_the_build_is_not_used(
    recipe, planted, tmp_path, monkeypatch, capfd
) -> None:
    compile_recipe = building.compile_recipe

    def exchanged(recipe: recipes.Recipe, library: Path) -> Path:
        if library.is_relative_to(tmp_path / "cache"):
            (tmp_path / "cache").rename(tmp_path / "aside")
            fill(library, planted.read_bytes())
        return compile_recipe(recipe, library)

    monkeypatch.setenv("PLANTED", str(tmp_path / "ran"))
    monkeypatch.setattr(building, "compile_recipe", exchanged)
    value, library = answer(recipe, tmp_path / "cache")
    assert value == 42 and not library.is_relative_to(tmp_path / "cache")
    assert "built just now, is not there" in capfd.readouterr().err


# --- What else may stand there ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_a_flipped_bit_is_noticed(seed: int, tmp_path) -> None:
    rng = random.Random(seed)
    content = rng.randbytes(10_000)
    library = tmp_path / "key" / NAME
    fill(library, content)
    directory = CacheDirectory.open(tmp_path, "key", create=False)
    assert directory is not None and directory.fault(NAME) is None
    for position in [0, len(content) - 1, *(rng.randrange(len(content)) for _ in range(20))]:
        flipped = bytearray(content)
        flipped[position] ^= 1 << rng.randrange(8)
        library.write_bytes(flipped)
        assert "its hash differs" in directory.fault(NAME)
    library.write_bytes(content[:-1])
    assert "its hash differs" in directory.fault(NAME)
    library.write_bytes(content)
    assert directory.fault(NAME) is None
    library.with_name(NAME + ".sha256").write_bytes(b"\xff")
    assert "its hash differs" in directory.fault(NAME)
    library.unlink()
    assert directory.fault(NAME) == MISSING


def a_directory(path: Path) -> None:
    (path / "with").mkdir(parents=True)
    (path / "with" / "content").touch()


@needs_compiler
@pytest.mark.parametrize("name", [NAME, NAME + ".sha256", "lock", "build.log"])
@pytest.mark.parametrize(
    "make", [a_directory, os.mkfifo, lambda path: path.symlink_to("/nowhere/at/all")], ids=["directory", "pipe", "link"]
)
def test_whatever_stands_under_a_name_is_replaced_or_left_alone(make: Callable, name: str, recipe, tmp_path) -> None:
    library = cached(recipe, tmp_path)
    library.parent.mkdir(mode=0o700)
    make(library.with_name(name))
    assert answer(recipe, tmp_path) == (42, library)
    assert not list(library.parent.glob("build-*"))


@needs_compiler
def test_one_file_is_enough_for_the_cache_or_its_directory_to_be_none(recipe, tmp_path, capfd) -> None:
    for place in (tmp_path / "cache", tmp_path / "other" / recipe.key):
        place.parent.mkdir(exist_ok=True)
        place.touch()
    for cache in (tmp_path / "cache", tmp_path / "other"):
        assert answer(recipe, cache)[0] == 42
        assert "is a file, where a directory is needed" in capfd.readouterr().err


def test_another_library_under_the_name_is_an_error_and_no_endless_recursion() -> None:
    """One that was loaded without a hash, from a wheel say, and has no kernels."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registration._LOADERS, "cpu", lambda: "native")
        patch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: False)
        with pytest.raises(loading.BuildError, match="has no cpu kernel for unlearn_ext::count_bits: it is another"):
            registration._first_use_kernel("count_bits")([torch.ones(1, dtype=torch.int32)])


# --- Modes --------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("umask", [0, 0o002, 0o022, 0o077])
def test_caches_are_private_whatever_the_umask(umask: int, recipe, tmp_path) -> None:
    before = os.umask(umask)
    try:
        library = building.build_cached(recipe, tmp_path / "home" / "cache")
    finally:
        os.umask(before)
    for path in (tmp_path / "home", tmp_path / "home" / "cache", library.parent, library):
        assert mode(path) == 0o700, path
    assert not [path for path in library.parent.iterdir() if mode(path) & 0o077]


def test_directories_that_are_there_keep_their_mode(tmp_path) -> None:
    tmp_path.chmod(0o1777)
    make_private(tmp_path / "a" / "b")
    make_private(tmp_path / "a" / "b")
    assert (mode(tmp_path), mode(tmp_path / "a"), mode(tmp_path / "a" / "b")) == (0o1777, 0o700, 0o700)


def test_a_sticky_directory_is_a_cache_and_a_link_to_one_too(tmp_path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    (tmp_path / "link").symlink_to(shared)
    for root in (shared, tmp_path / "link"):
        directory = CacheDirectory.open(root, "key", create=True)
        assert directory is not None and directory.path == shared / "key" and mode(directory.path) == 0o700


@needs_root
def test_root_keeps_out_of_another_users_home(tmp_path) -> None:
    os.chown(tmp_path, SOMEBODY, -1)
    with pytest.raises(UnusableError, match="belongs to another user"):
        CacheDirectory.open(tmp_path / ".cache" / "unlearn_ext", "key", create=True)
    assert not list(tmp_path.iterdir())


@needs_root
def test_what_root_built_serves_others_and_what_they_cannot_read_does_not(public) -> None:
    fill(public / "open" / "key" / NAME, b"content")
    for path in (public / "open", public / "open" / "key", *(public / "open" / "key").iterdir()):
        path.chmod(0o755)
    fill(public / "closed" / "key" / NAME, b"content")
    os.seteuid(SOMEBODY)
    try:
        directory = CacheDirectory.open(public / "open", "key", create=False)
        assert directory is not None and directory.fault(NAME) is None
        with pytest.raises(UnusableError, match=r"cannot use .*Permission denied"):
            CacheDirectory.open(public / "closed", "key", create=False)
    finally:
        os.seteuid(0)


def test_the_hash_is_one_that_sha256sum_checks(tmp_path) -> None:
    built = tmp_path / "built"
    built.write_bytes(b"content")
    put(built, tmp_path / NAME)
    assert (tmp_path / (NAME + ".sha256")).read_text() == f"{sha256(b'content').hexdigest()}  {NAME}\n"
    assert (tmp_path / NAME).read_bytes() == b"content" and not built.exists()


# --- The cause is told --------------------------------------------------------------------------------------


@needs_compiler
def test_a_cache_without_execution_is_named_as_such(recipe, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(library_cache, "is_noexec", lambda place: isinstance(place, int))  # a temporary one is a path
    library = building.build_cached(recipe, tmp_path / "cache")
    said = capfd.readouterr().err.splitlines()[0]
    assert not library.is_relative_to(tmp_path / "cache")
    assert "mounted noexec" in said and "for this process only" in said and "UNLEARN_EXT_CACHE" in said
    monkeypatch.setattr(library_cache, "is_noexec", lambda place: True)
    with pytest.raises(loading.BuildError, match=r"mounted noexec.* and .*mounted noexec: let UNLEARN_EXT_CACHE name"):
        building.build_cached(recipe, tmp_path / "cache")


@pytest.mark.parametrize("place", ["/", "/proc", "/sys", "/dev/shm"])
def test_noexec_is_read_from_the_file_system(place: str) -> None:
    mounts = Path("/proc/mounts")
    lines = mounts.read_text().splitlines() if mounts.is_file() else []
    options = [fields[3].split(",") for fields in map(str.split, lines) if fields[1] == place]
    if not options:
        pytest.skip(f"{place} is no mount point here")
    assert library_cache.is_noexec(place) == ("noexec" in options[-1])


@pytest.mark.parametrize("cached_one", [True, False])
def test_what_the_loader_says_is_shown(cached_one: bool, tmp_path, monkeypatch) -> None:
    def refuse(path: str) -> None:
        raise OSError(f"{path}: failed to map segment from shared object")

    monkeypatch.setattr(loading.ctypes, "CDLL", refuse)
    library = tmp_path / "key" / NAME
    fill(library, b"content")
    if cached_one:
        directory = CacheDirectory.open(tmp_path, "key", create=False)
        monkeypatch.setitem(building._directories, library, directory)
    with pytest.raises(loading.BuildError) as caught:
        loading._load_library(library)
    message = str(caught.value)
    assert message.startswith(f"{library} does not load: ")
    assert "failed to map segment from shared object" in message
    assert "noexec" in message and "UNLEARN_EXT_CACHE" in message


@needs_compiler
def test_an_undefined_symbol_is_named(recipe, tmp_path) -> None:
    (recipe.csrc / "answer.c").write_text("extern int missing;\nint answer(void) { return missing; }\n")
    library = building.build_cached(recipe, tmp_path)
    with pytest.raises(loading.BuildError, match=r"does not load: .*undefined symbol: missing; .*UNLEARN_EXT_CACHE"):
        loading._load_library(library)


def test_a_cache_that_cannot_be_written_is_named(recipe, tmp_path, monkeypatch, capfd) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "mkdir", full)
    with pytest.raises(loading.BuildError) as caught:
        building.build_cached(recipe, tmp_path / "cache")
    message = str(caught.value)
    assert "cannot use" in message and "no temporary directory" in message and message.count("Read-only") == 2
    assert "UNLEARN_EXT_CACHE" in message


@needs_compiler
def test_a_full_disk_is_named(recipe, tmp_path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(library_cache, "put", full)
    with pytest.raises(loading.BuildError, match=r"cannot build in .*: No space left on device; UNLEARN_EXT_CACHE"):
        building.build_cached(recipe, tmp_path / "cache")


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({"UNLEARN_EXT_CACHE": "/a/b", "HOME": "/home/me"}, "/a/b"),
        ({"UNLEARN_EXT_CACHE": "~/b", "HOME": "/home/me"}, "/home/me/b"),
        ({"XDG_CACHE_HOME": "/x", "HOME": "/home/me"}, "/x/unlearn_ext"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/home/me"}, "/home/me/.cache/unlearn_ext"),
        ({"UNLEARN_EXT_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/home/me"}, "/home/me/.cache/unlearn_ext"),
        ({"HOME": ""}, None),
        ({"HOME": "relative"}, None),
    ],
)
def test_where_the_cache_is(variables: dict[str, str], expected: str | None, monkeypatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    cache = building.cache_directory()
    assert cache == (None if expected is None else Path(expected))


def test_a_user_without_a_home(monkeypatch) -> None:
    def unknown(*_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    assert building.cache_directory() is None
    monkeypatch.setenv("UNLEARN_EXT_CACHE", "~nobody-of-that-name/x")
    with pytest.raises(InputError, match="UNLEARN_EXT_CACHE is '~nobody-of-that-name/x', and there is no such home"):
        building.cache_directory()


@needs_compiler
def test_without_a_home_the_library_is_for_one_process(recipe, monkeypatch, capfd) -> None:
    monkeypatch.setattr(building, "cache_directory", lambda: None)
    library = building.build_cached(recipe, None)
    said = capfd.readouterr().err.splitlines()[0]
    assert "no home directory" in said and "UNLEARN_EXT_CACHE" in said and library.is_file()
