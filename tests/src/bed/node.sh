#!/bin/sh
# The first process of a node: makes the node's own file system view, then holds it open.
# Runs in the node's new mount, UTS, network and control group namespaces.  $1: the node's name, $2: its directory.
set -eu
name=$1 directory=$2

hostname "$name"
mkdir -p "$directory/containerd" "$directory/kubelet"

# /sys must show this network namespace's devices, and the node's control groups as if they were the machine's:
# the runtime puts its containers below the root that it sees, which is the node's own group.
groups=$(grep -E ' /sys/fs/cgroup[^ ]* cgroup2? ' /proc/mounts)
mount -t sysfs sysfs /sys
mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
echo "$groups" | while read -r _ point kind options _; do
    controllers=$(echo "$options" | tr , '\n' |
        grep -vE '^(rw|ro|(rel|no)atime|no(suid|dev|exec)|xattr|clone_children|nsdelegate|memory_.*|release_agent=.*)$' |
        paste -sd, - || true)
    case $controllers in name=*) controllers=none,$controllers ;; esac
    mkdir -p "$point"
    mount -t "$kind" ${controllers:+-o "$controllers"} "$kind" "$point"
done
mount -t bpf bpf /sys/fs/bpf

# Whatever a pod or the kubelet writes here is the node's alone, and gone with its directory.
for part in etc opt var/lib var/log; do
    layer="$directory/layers/$part"
    mkdir -p "$layer/upper" "$layer/work"
    mount -t overlay overlay -o "lowerdir=/$part,upperdir=$layer/upper,workdir=$layer/work" "/$part"
done
# Not on an overlay: containerd's own snapshots are overlays themselves.
mkdir -p /var/lib/containerd /var/lib/kubelet
mount --bind "$directory/containerd" /var/lib/containerd
mount --bind "$directory/kubelet" /var/lib/kubelet
mkdir -p /etc/cni/net.d /opt/cni/bin
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/lock /run/netns
[ -s "$directory/machine-id" ] || tr -d - </proc/sys/kernel/random/uuid >"$directory/machine-id"
cp "$directory/machine-id" /etc/machine-id

mount --make-rshared /
touch "$directory/up"
exec sleep infinity
