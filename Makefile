CARGO ?= cargo
LM = $(CARGO) run --quiet --release --example train_lm --
SMALL = --hidden 64 --vocab 1000 --seq 64 --batch 4 --microbatches 2

.PHONY: test lint unit samples bench dumps

test: lint unit samples

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings

# Tests that need numpy are ignored by default, by name and with the reason; they run where a virtual environment can be made.
unit:
	@if tests/scripts/python-venv; then \
	    FUSED_XENT_PYTHON="$(CURDIR)/.venv/bin/python" $(CARGO) test --workspace -- --include-ignored; \
	else \
	    echo "SKIPPED, for want of python3 with numpy and ml_dtypes, the tests that cargo shows below as ignored"; \
	    $(CARGO) test --workspace; \
	fi

samples:
	$(CARGO) build
	tests/scripts/sample-dumps target/debug/xent-diff

bench:
	$(CARGO) bench --workspace

# The sample dumps: real steps of the small language model of examples/train_lm, healthy and with a fault in its backward.
dumps:
	rm -rf dumps/*/
	$(LM) $(SMALL) --steps 151 --capture-at 0,150 --dumps dumps/healthy
	$(LM) $(SMALL) --steps 151 --capture-at 150 --fault label-scatter-bf16 --dumps dumps/label-scatter-bf16
	$(LM) $(SMALL) --steps 151 --capture-at 150 --fault dk-accumulate-bf16 --dumps dumps/dk-accumulate-bf16
	$(LM) $(SMALL) --steps 151 --capture-at 150 --fault mean-of-means --dumps dumps/mean-of-means
