CARGO ?= cargo

.PHONY: test lint unit pjrt-cpu python samples aarch64 bench bench-peers dumps

test: lint unit python samples

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	$(CARGO) clippy --all-targets --features pjrt -- -D warnings

# All Rust tests. Those that need numpy, a PJRT plugin, MLIR's tools or the TPU compiler are ignored by default, by name and with the
# reason; they run where these can be had.
unit:
	@tests/scripts/unit "$(CARGO)"

# XLA for the CPU as a PJRT plugin, from a public wheel: 274 MB are fetched once, and one C++ file compiled.
pjrt-cpu:
	@plugins/xla-cpu/build

# The wheel's own tests, many of them in several processes; each has a time limit.
python:
	@if tests/scripts/python-venv && .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
	    $(CARGO) build && VIRTUAL_ENV="$(CURDIR)/.venv" .venv/bin/maturin develop --quiet --manifest-path python/Cargo.toml && \
	    XENT_DIFF="$(CURDIR)/target/debug/xent-diff" .venv/bin/python -m pytest -q -rs -p no:cacheprovider tests/python && \
	    if tests/scripts/python-venv older-jaxlib; then \
	        PYTHONPATH=python .venv-older-jaxlib/bin/python -m pytest -q -rs -p no:cacheprovider -m each_jaxlib tests/python/test_kernel*.py; \
	    else \
	        echo "SKIPPED the tests of the kernel in JAX with an older jaxlib, which could not be installed"; \
	    fi; \
	else \
	    echo "SKIPPED the tests of the Python wheel, for want of python3 of version 3.11 or later with jax"; \
	fi

samples:
	$(CARGO) build
	tests/scripts/sample-dumps target/debug/xent-diff

# The kernels' unit tests for AArch64, in an emulator; it fetches 220 MB of tools once.
aarch64:
	tests/scripts/aarch64

bench:
	$(CARGO) bench --workspace

# The kernel beside PyTorch and JAX; it downloads them once, some 3 GB. PEERS="--shape 4096,1024,50304 --rounds 5" and so on.
bench-peers:
	benches/peers/run $(PEERS)

# The sample dumps: late steps of the small language model of examples/train_lm, healthy and with a bug in its backward, and a
# step spread over processes that was made to order. dumps/expected.txt says what xent-diff must find in each.
dumps:
	rm -rf dumps/*/
	examples/make_sample_dumps.sh dumps
	$(CARGO) run --release -- synth dumps/synth-vocab-tail-dropped --processes 2 --microbatches 3 --fault vocab-tail-dropped:tile=128
