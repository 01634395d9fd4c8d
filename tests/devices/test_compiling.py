"""What is asked of JAX before a step is compiled: settings that it cannot have, and devices that are not there."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import jax
import pytest

from llama_jax.devices.compiling import check_devices, check_jax_settings, use_compilation_cache
from llama_jax.errors import UserError


@pytest.mark.parametrize("name", ["jax_enable_x64", "jax_disable_jit"])
def test_a_setting_of_jax_that_training_cannot_have_is_refused(name: str) -> None:
    check_jax_settings()
    jax.config.update(name, True)
    try:
        with pytest.raises(UserError, match=rf"^{name.upper()}: expected to be off in training, .*; unset it$"):
            check_jax_settings()
    finally:
        jax.config.update(name, False)


@pytest.mark.parametrize("error", [RuntimeError("Unable to initialize\nbackend"), AssertionError()])
def test_devices_that_are_asked_for_and_are_not_there_are_a_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> NoReturn:
        raise error

    check_devices()
    monkeypatch.setattr(jax, "devices", fail)
    asked = re.escape(str(jax.config.jax_platforms))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=rf"^JAX_PLATFORMS: expected devices of {asked}, found none \(.+\); "):
        check_devices()


CACHE = "jax_compilation_cache_dir"


@pytest.fixture
def cache_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    names = (CACHE, "jax_persistent_cache_min_compile_time_secs", "jax_persistent_cache_min_entry_size_bytes")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.usefixtures("cache_settings")
@pytest.mark.parametrize("given", ["mine", "gs://bucket/programs"])
def test_the_folder_of_compiled_programs_that_a_program_has_set_stays(given: str, tmp_path: Path) -> None:
    jax.config.update(CACHE, given)
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == given  # type: ignore[attr-defined]
    assert [path.name for path in tmp_path.iterdir()] == ([] if "://" in given else [given])


@pytest.mark.usefixtures("cache_settings")
def test_without_one_compiled_programs_are_kept_in_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jax.config.update(CACHE, None)
    use_compilation_cache()
    assert Path(jax.config.jax_compilation_cache_dir) == tmp_path / "cache" / "llama_jax" / "compiled"  # type: ignore[attr-defined]
    jax.config.update(CACHE, None)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "named"))
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "named")  # type: ignore[attr-defined]
