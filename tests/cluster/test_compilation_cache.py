"""What processes keep of what they have compiled."""

import jax
import jax.numpy as jnp
import pytest
from jax._src import compilation_cache, compiler, distributed

from cluster.private import cache_every_process


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """An empty compilation cache, which takes what compiles in no time too; afterwards the cache that was there."""
    before = {
        name: getattr(jax.config, name)
        for name in (
            "jax_compilation_cache_dir",
            "jax_persistent_cache_min_compile_time_secs",
            "jax_enable_compilation_cache",
        )
    }
    monkeypatch.setattr(compiler, "_cache_write", compiler._cache_write)  # put back when the test ends
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.parametrize("rank", [0, 1])
def test_every_process_keeps_what_it_compiles(empty_cache, monkeypatch, rank):
    monkeypatch.setattr(distributed.global_state, "process_id", rank)
    cache_every_process()
    jax.jit(lambda x: x * (3.0 + rank))(jnp.ones(7)).block_until_ready()
    assert list(empty_cache.glob("jit__lambda*"))
