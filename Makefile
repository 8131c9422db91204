# The build graph: kernel, static agent, binaries, install, tests. `make help` lists the targets.

PREFIX  ?= /usr/local
DESTDIR ?=

# A staged installation; the binaries find their parts relative to themselves.
STAGE   := build
BIN     := $(STAGE)/bin
LIBEXEC := $(STAGE)/libexec/casemate
SHARE   := $(STAGE)/share/casemate
MAN     := share/man/man1
# Where each shell looks, below any prefix.
BASH    := share/bash-completion/completions
ZSH     := share/zsh/site-functions
FISH    := share/fish/vendor_completions.d

TRIPLE  := x86_64-unknown-linux-gnu
# Static: no dynamic linker on the start path, nothing to look up inside an empty root or a guest.
STATIC  := RUSTFLAGS="-C target-feature=+crt-static" CARGO_TARGET_DIR=target/static cargo build --locked --quiet --release --target $(TRIPLE)
GUEST   := RUSTFLAGS="-C target-feature=+crt-static -C relocation-model=static" CARGO_TARGET_DIR=target/guest cargo build --locked --quiet --profile agent --target $(TRIPLE)

.PHONY: all build help setup setup-test kernel binaries virtiofsd demo test lint unit e2e inside posix conformance faults gate fuzz bench reproduce install uninstall clean

all: build

help:
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup:
	@scripts/setup

setup-test:
	@scripts/setup test

build: kernel binaries ## build everything into build/

kernel: setup
	@mkdir -p $(SHARE)
	@vmlinux=$$(guest-kernel-config/build guest) && install -m 644 "$$vmlinux" "$${vmlinux%/*}/System.map" $(SHARE)/

binaries: setup virtiofsd
	@mkdir -p $(BIN) $(LIBEXEC) $(SHARE)
	@$(GUEST) -p casemate-agent
	@$(STATIC) -p casemate-vmm --bin casemate-vmm
	@$(STATIC) -p casemate --no-default-features --bin containerd-shim-casemate-v2
	@cargo build --locked --quiet --release -p casemate --bin casemate
	@install -m 755 target/static/$(TRIPLE)/release/casemate-vmm $(LIBEXEC)/
	@install -m 755 target/static/$(TRIPLE)/release/containerd-shim-casemate-v2 target/release/casemate $(BIN)/
	@agent/mkinitrd target/guest/$(TRIPLE)/agent/casemate-agent $(SHARE)/initrd.cpio
	@mkdir -p $(addprefix $(STAGE)/,$(MAN) $(BASH) $(ZSH) $(FISH))
	@$(BIN)/casemate man $(STAGE)/$(MAN)
	@$(BIN)/casemate completion bash > $(STAGE)/$(BASH)/casemate
	@$(BIN)/casemate completion zsh > $(STAGE)/$(ZSH)/_casemate
	@$(BIN)/casemate completion fish > $(STAGE)/$(FISH)/casemate.fish

# Serves the host's directories to guests. Pinned; built once and kept with the other tools.
virtiofsd: setup
	@mkdir -p $(LIBEXEC)
	@scripts/virtiofsd $(LIBEXEC)/

demo: build ## run a real Debian image in a microVM
	@scripts/demo

test: setup-test lint unit e2e gate fuzz ## pass the tests

lint: setup-test
	cargo fmt --all --check
	cargo fmt --manifest-path fuzz/Cargo.toml --check
	cargo clippy --workspace --all-targets --all-features --quiet -- -D warnings
	shellcheck -s sh tests/take-tests tests/inside/* tests/posix/image tests/posix/many tests/posix/on-host tests/posix/run scripts/pjdfstest
	shellcheck -s sh tests/conformance/deploy tests/conformance/images tests/conformance/on-host tests/conformance/run tests/conformance/summary tests/conformance/tools
	shellcheck runtime-shim/deploy/install
	test -z "$$(PATH=$$PATH:/usr/local/go/bin gofmt -l tests/conformance)"
	shellcheck docs/ci/casemate-job docs/ci/gitlab/config docs/ci/gitlab/prepare docs/ci/gitlab/run docs/ci/gitlab/cleanup
	$${XDG_CACHE_HOME:-$$HOME/.cache}/casemate/tools/bin/cargo-deny --offline check bans licenses sources

unit: setup-test
	cargo test --workspace --features casemate-tests/bench --quiet
	tests/conformance/deploy

e2e: setup-test build ## the end-to-end tests, on the KVM host
	tests/kvm-host/selftest
	vmm/tests/run
	tests/run-e2e
	tests/run-faults --points 12 --only 0-3 --cycles 2

inside: setup-test build ## Docker's daemon, podman and systemd, each in a container
	tests/inside/run

posix: setup-test build ## pjdfstest and 100,000 files on binds; writes target/posix/summary.json
	tests/posix/run $(POSIX_KINDS)

conformance: setup-test build ## critest against several containerds, with casemate and with runc; writes target/conformance/summary.json
	tests/conformance/run $(foreach name,$(CONFORMANCE_CONFIGS),--config $(name)) $(foreach name,$(CONFORMANCE_HANDLERS),--handler $(name))

faults: setup-test build ## FAULT_POINTS=200 FAULT_CYCLES=1000 FAULT_SEED=1
	tests/run-faults --points $(or $(FAULT_POINTS),200) --cycles $(or $(FAULT_CYCLES),1000) --seed $(or $(FAULT_SEED),1)

gate: setup-test build ## compare the starts with tests/bench/baseline.json
	tests/bench/run gate

fuzz: setup-test ## FUZZ_SECONDS=60 for each target
	fuzz/run $(or $(FUZZ_SECONDS),5)

bench: setup-test build ## measure; writes target/bench/ and docs/performance.md
	tests/bench/run

reproduce: setup ## build both kernels once more and compare them with the cached ones
	guest-kernel-config/build --verify guest
	guest-kernel-config/build --verify kvm-host

install: ## PREFIX=/usr/local DESTDIR=
	@test -x $(BIN)/casemate || { echo "nothing to install: run make first" >&2; exit 1; }
	install -d $(addprefix $(DESTDIR)$(PREFIX)/,bin libexec/casemate share/casemate $(MAN) $(BASH) $(ZSH) $(FISH))
	install -m 755 $(BIN)/casemate $(BIN)/containerd-shim-casemate-v2 $(DESTDIR)$(PREFIX)/bin/
	install -m 755 $(LIBEXEC)/casemate-vmm $(LIBEXEC)/virtiofsd $(DESTDIR)$(PREFIX)/libexec/casemate/
	install -m 644 $(SHARE)/vmlinux $(SHARE)/System.map $(SHARE)/initrd.cpio $(DESTDIR)$(PREFIX)/share/casemate/
	install -m 644 $(STAGE)/$(MAN)/casemate*.1 $(DESTDIR)$(PREFIX)/$(MAN)/
	install -m 644 $(STAGE)/$(BASH)/casemate $(DESTDIR)$(PREFIX)/$(BASH)/
	install -m 644 $(STAGE)/$(ZSH)/_casemate $(DESTDIR)$(PREFIX)/$(ZSH)/
	install -m 644 $(STAGE)/$(FISH)/casemate.fish $(DESTDIR)$(PREFIX)/$(FISH)/

uninstall: ## PREFIX=/usr/local DESTDIR=
	rm -f $(DESTDIR)$(PREFIX)/bin/casemate $(DESTDIR)$(PREFIX)/bin/containerd-shim-casemate-v2
	rm -f $(DESTDIR)$(PREFIX)/$(MAN)/casemate.1 $(DESTDIR)$(PREFIX)/$(MAN)/casemate-*.1
	rm -f $(DESTDIR)$(PREFIX)/$(BASH)/casemate $(DESTDIR)$(PREFIX)/$(ZSH)/_casemate $(DESTDIR)$(PREFIX)/$(FISH)/casemate.fish
	rm -rf $(DESTDIR)$(PREFIX)/libexec/casemate $(DESTDIR)$(PREFIX)/share/casemate

clean:
	rm -rf $(STAGE) target
