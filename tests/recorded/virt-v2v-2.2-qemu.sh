#!/bin/sh -

qemu-system-x86_64 \
    -no-user-config \
    -nodefaults \
    -name system \
    -machine q35,accel=kvm:tcg \
    -m 2048 \
    -drive file=/var/tmp/rec/qemu/system-sda,format=raw,if=none,id=drive-vblk-0,media=disk \
    -device virtio-blk-pci,drive=drive-vblk-0 \
    -netdev user,id=net0 \
    -device virtio-net-pci,netdev=net0 \
    -display gtk \
    -vga std \
    -object rng-random,filename=/dev/urandom,id=rng0 \
    -device virtio-rng-pci,rng=rng0 \
    -device virtio-balloon \
    -device pvpanic,ioport=0x505 \
    -device vhost-vsock-pci,guest-cid=4756 \
    -serial stdio
