# SPDX-License-Identifier: BSD-2-Clause

BUILD := .build
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
GO := go
# The kernel that `make kmod` builds for: its headers, as Debian installs them.
KDIR ?= $(firstword $(wildcard /lib/modules/$(shell uname -r)/build) $(lastword $(sort $(wildcard /lib/modules/*/build))))
# Types for BPF programs, and a second look, only where there is the tool for them.
NO_BTF = $(if $(shell command -v pahole),,CONFIG_DEBUG_INFO_BTF_MODULES=)
SPARSE = $(if $(shell command -v sparse),2,0)
KREL = $(shell cut -d'"' -f2 $(KDIR)/include/generated/utsrelease.h)
DKMS_SRC := /usr/src/dm-dsync-1.0.0
# Two guests at a time: each keeps one processor busy, and has up to 2 GiB of memory.
VMTEST = $(GO) test -timeout $(if $(SOAK),48h,85m) -parallel 2
HOSTTEST = $(GO) test -timeout $(if $(SOAK),48h,85m) -p 1
export GOFLAGS := -buildvcs=false
export GOTOOLCHAIN := auto

.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## build ./dsync-backup
	@LDFLAGS="-X main.version=$(VERSION)" tools/static build -trimpath -o dsync-backup ./cmd/dsync-backup

demo: ## as root: track, back up, change and restore a loop device, and show the figures
	@tools/install demo
	@$(MAKE) --no-print-directory build
	@tools/demo

ready:
	@tools/install test
	@$(MAKE) --no-print-directory $(BUILD)/restic-0.18 $(BUILD)/minio
	$(GO) vet ./...
	CGO_ENABLED=0 $(GO) vet ./repo
	cd bench && $(GO) vet ./...

# The host's tests wait a good deal, for disks and processes: guests have the time meanwhile.
test: ready ## as root: install what the tests need, then run them all (SOAK=1: the long counts)
	@tools/kernels
	@$(MAKE) --no-print-directory -j2 host-tests guest-tests

test-host: ready ## as root: the tests that need no kernel of their own
	@$(MAKE) --no-print-directory host-tests

host-tests:
	$(HOSTTEST) $$($(GO) list ./... | grep -v '/systemtest/vm$$')
	cd bench && $(HOSTTEST) ./...

guest-tests:
	nice -n 5 $(VMTEST) ./systemtest/vm

test-vm: ## the tests that need a kernel of their own, under QEMU (RUN=TestBoot/6.12: only that)
	@tools/install test
	@tools/kernels
	$(VMTEST) -v $(if $(RUN),-run '$(RUN)') ./systemtest/vm

lint: $(BUILD)/golangci-lint $(BUILD)/gofumpt ## run the linters
	$(BUILD)/golangci-lint run ./...
	@test -z "$$($(BUILD)/gofumpt -l bench cmd kernel repo restore snapshot systemtest)"

generate: ## rebuild the eBPF objects (needs clang)
	$(GO) generate ./...

kmod: ## build the kernel module into .build/kmod/RELEASE/ (KDIR=/usr/src/linux-headers-...)
	@test -n "$(KDIR)" || { echo "no kernel headers: install linux-headers-amd64, or give KDIR=" >&2; exit 1; }
	@mkdir -p $(BUILD)/kmod/$(KREL)
	@cp kernel/module/Kbuild kernel/module/*.c $(BUILD)/kmod/$(KREL)/
	$(MAKE) -C $(KDIR) M=$(CURDIR)/$(BUILD)/kmod/$(KREL) W=1 C=$(SPARSE) KCFLAGS=-Werror $(NO_BTF) modules

install-dkms: ## as root: install the kernel module through DKMS, for this and later kernels
	install -d $(DKMS_SRC)
	install -m 644 kernel/module/Kbuild kernel/module/dkms.conf kernel/module/*.c $(DKMS_SRC)/
	dkms install --force dm-dsync/1.0.0

install-units: ## as root: install the systemd unit that tracks data volumes from boot to shutdown
	install -d /etc/systemd/system
	install -m 644 packaging/systemd/*.service /etc/systemd/system/
	@echo "now: systemctl daemon-reload; docs/reboots.md says how it is enabled"

bench: ## as root: compare with other tools, write docs/benchmarks (QUICK=1: minutes; ONLY=sync,full SIZES=8)
	@tools/install bench
	@$(MAKE) --no-print-directory build $(BUILD)/restic-0.18 $(BUILD)/minio $(BUILD)/bench
	@test -n "$(NO_KOPIA)" || $(MAKE) --no-print-directory $(BUILD)/kopia
	$(BUILD)/bench $(if $(QUICK),-quick) $(if $(ONLY),-only $(ONLY)) $(if $(SIZES),-sizes $(SIZES)) $(BENCHFLAGS)

microbench: ## memory and throughput of single parts (minutes; needs root)
	$(GO) test -run '^$$' -bench . -benchtime 1x -timeout 60m ./snapshot/... ./restore/... ./repo/... ./kernel/bpf ./systemtest

bench-vm: ## the kernel module's overhead against dm-linear, and 4 TiB, under QEMU (minutes)
	@tools/install test
	@tools/kernels
	$(GO) test -run '^$$' -bench . -benchtime 1x -timeout 60m ./systemtest/vm

clean: ## remove what was built
	rm -rf $(BUILD) dsync-backup

$(BUILD)/restic-0.18: tools/restic/go.mod
	cd tools/restic && $(GO) build -o ../../$@ github.com/restic/restic/cmd/restic

$(BUILD)/minio: tools/minio/go.mod
	cd tools/minio && $(GO) build -o ../../$@ github.com/minio/minio

$(BUILD)/kopia: tools/kopia/go.mod
	cd tools/kopia && $(GO) build -o ../../$@ github.com/kopia/kopia

$(BUILD)/bench: $(wildcard bench/*.go bench/*/*.go) bench/go.mod
	cd bench && $(GO) build -o ../$@ .

$(BUILD)/golangci-lint: tools/lint/go.mod
	cd tools/lint && $(GO) build -o ../../$@ github.com/golangci/golangci-lint/v2/cmd/golangci-lint

$(BUILD)/gofumpt: tools/lint/go.mod
	cd tools/lint && $(GO) build -o ../../$@ mvdan.cc/gofumpt

.PHONY: help build demo ready test test-host host-tests guest-tests test-vm lint generate kmod install-dkms bench microbench bench-vm clean
