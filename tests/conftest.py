"""Strictness for the whole suite: no silent dtype or rank promotion anywhere; equal programs compile once."""

import atexit
import gc
import os
import shutil
import tempfile
from importlib import metadata

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# `make test-optimised` runs numeric tests on the programs that users run.
if "STEEL_AD_OPTIMISED" not in os.environ:
    # Compiling is most of the suite's time, and its arrays are small; binaries that a test starts inherit it.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    # The workers share the cores: a program divided to be compiled by threads costs a sixth more. The last of equal flags counts.
    os.environ["XLA_FLAGS"] = f"--xla_cpu_parallel_codegen_split_count=1 {os.environ.get('XLA_FLAGS', '')}".strip()
    # XLA's older emitters compile a training step in a quarter of the time. An XLA that does not know a flag aborts.
    if metadata.version("jaxlib").startswith("0.10."):
        os.environ["XLA_FLAGS"] = f"--xla_cpu_use_fusion_emitters=false {os.environ['XLA_FLAGS']}"

import jax

# Traces are many small objects that live long: collecting them as often as Python does by default takes a twentieth of the time.
gc.set_threshold(100_000, 20, 100)

# The suite's workers and the binaries that tests start share one cache of compiled programs.
if "STEEL_AD_TEST_CACHE" not in os.environ:
    os.environ["STEEL_AD_TEST_CACHE"] = tempfile.mkdtemp(prefix="steel_ad_tests_")
    atexit.register(shutil.rmtree, os.environ["STEEL_AD_TEST_CACHE"], ignore_errors=True)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", os.environ["STEEL_AD_TEST_CACHE"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)

# Modules that take longest go first, so that the workers end together.
_LONGEST = ("segmentation", "autoencoder_binary", "sweep", "benchmark", "native", "stored_samples", "parallel")
_LONGEST += ("inspection", "supervised_models", "training", "stored", "autoencoder_model", "export")


def pytest_collection_modifyitems(items):
    ranks = {f"test_{name}": rank for rank, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))
