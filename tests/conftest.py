"""Strictness for the whole suite: no silent dtype or rank promotion anywhere; equal programs compile once."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

_cache = tempfile.mkdtemp(prefix="steel_ad_tests_")
atexit.register(shutil.rmtree, _cache, ignore_errors=True)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", _cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
os.environ["STEEL_AD_TEST_CACHE"] = _cache  # binaries started by a test share it
