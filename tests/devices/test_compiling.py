"""What is asked of JAX before a step is compiled: settings that it cannot have, and devices that are not there."""

import re
from typing import NoReturn

import jax
import pytest

from llama_jax.devices.compiling import check_devices, check_jax_settings
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
