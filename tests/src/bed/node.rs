//! A node: network, mount and UTS namespaces with a real containerd, kubelet and kube-proxy.

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use nix::unistd::Pid;
use serde_json::json;

use super::{
    Bed, NodeRecord,
    cgroup::Cgroup,
    containerd::Containerd,
    daemon::{Daemon, Place},
    layout::POD_CIDR_V6,
    net, secrets,
};
use crate::{
    images::{PAUSE, link_store},
    run,
};

const HOLDER: &str = include_str!("node.sh");

/// Makes the node's disks and starts it.
pub fn create(bed: &Bed, node: &NodeRecord) -> Result<()> {
    let directory = bed.plan.node_directory(&node.shape.name);
    fs::create_dir_all(&directory)?;
    secrets::add_node(&bed.plan, &node.shape.name)?;
    fs::write(directory.join("node.sh"), HOLDER)?;
    link_store(&bed.images.store, &directory.join("containerd"))?;
    configure(bed, node)?;
    start(bed, node)
}

/// Starts a node whose disks are there: namespaces, then programs.
pub fn start(bed: &Bed, node: &NodeRecord) -> Result<()> {
    let name = &node.shape.name;
    let namespace = bed.plan.netns(name);
    net::connect(&bed.plan, name, bed.plan.node(node.number))?;
    for (key, value) in [
        ("net.ipv4.ip_forward", "1"),
        ("net.ipv6.conf.all.forwarding", "1"),
        ("net.bridge.bridge-nf-call-iptables", "1"),
        ("net.bridge.bridge-nf-call-ip6tables", "1"),
        ("net.ipv4.conf.all.rp_filter", &node.shape.rp_filter.to_string()),
        ("net.ipv4.conf.default.rp_filter", &node.shape.rp_filter.to_string()),
    ] {
        net::sysctl(&namespace, key, value)?;
    }
    let cgroup = cgroup(bed, name);
    cgroup.create()?;
    let directory = bed.plan.node_directory(name);
    let ready = directory.join("up");
    let _ = fs::remove_file(&ready);
    let holder = Daemon { place: Place::Netns(namespace), ..daemon(bed, name, "holder", Pid::this()) };
    let script = directory.join("node.sh").display().to_string();
    let directory_text = directory.display().to_string();
    let arguments: Vec<String> =
        ["--mount", "--uts", "--cgroup", "--propagation", "private", "sh", &script, name, &directory_text]
            .map(str::to_owned)
            .into();
    holder.start(Path::new("unshare"), &arguments)?;
    run::wait_for(&format!("{name} has its file systems"), Duration::from_secs(10), || Ok(ready.exists()))
        .with_context(|| format!("see {}", holder.log().display()))?;
    let root = stable_root(bed, name);
    let _ = fs::remove_file(&root);
    std::os::unix::fs::symlink(self::root(bed, name)?, &root)?;
    install_cni_plugins(bed, node)?;
    start_programs(bed, node)
}

/// Starts containerd, kube-proxy and kubelet.
pub fn start_programs(bed: &Bed, node: &NodeRecord) -> Result<()> {
    let name = &node.shape.name;
    let holder = holder(bed, name)?;
    let configuration = |file: &str| bed.plan.node_directory(name).join(file).display().to_string();
    let kubeconfig = bed.plan.kubeconfig_inside(name).display().to_string();
    let containerd = containerd(bed, name)?;
    daemon(bed, name, "containerd", holder)
        .start(&containerd.program, &["--config".to_owned(), configuration("containerd.toml")])?;
    run::wait_for(&format!("containerd of {name} answers"), Duration::from_secs(30), || {
        run::output(&mut containerd.ctr(&["version"])).map(|_| true)
    })?;
    daemon(bed, name, "kube-proxy", holder)
        .start(&bed.program("kube-proxy")?, &[format!("--config={}", configuration("kube-proxy.json"))])?;
    let mut arguments = vec![
        format!("--config={}", configuration("kubelet.json")),
        format!("--kubeconfig={kubeconfig}"),
        format!("--hostname-override={name}"),
        format!("--node-ip={}", node_addresses(bed, node)),
    ];
    if node.shape.control_plane {
        arguments.push("--register-with-taints=node-role.kubernetes.io/control-plane=:NoSchedule".to_owned());
    }
    daemon(bed, name, "kubelet", holder).start_kept(&bed.program("kubelet")?, &arguments)
}

/// Ends everything that runs on the node and its namespaces; its disks stay.
pub fn stop(bed: &Bed, name: &str) -> Result<()> {
    cgroup(bed, name).kill()?;
    net::disconnect(&bed.plan, name)
}

/// The process that holds the node's namespaces open.
pub fn holder(bed: &Bed, name: &str) -> Result<Pid> {
    daemon(bed, name, "holder", Pid::this()).pid().with_context(|| format!("the node {name} isn't running"))
}

/// The node's containerd, as seen from the machine.
pub fn containerd(bed: &Bed, name: &str) -> Result<Containerd> {
    let root = root(bed, name)?;
    Containerd::new(&bed.parts, &root.join("var/lib/containerd"), &root.join("run/containerd"))
}

/// The node's file system, as seen from the machine.
pub fn root(bed: &Bed, name: &str) -> Result<PathBuf> {
    Ok(PathBuf::from(format!("/proc/{}/root", holder(bed, name)?)))
}

/// The same under a path that stays when the node is rebooted.
#[must_use]
pub fn stable_root(bed: &Bed, name: &str) -> PathBuf {
    bed.plan.node_directory(name).join("root")
}

/// One of the node's programs: `containerd`, `kubelet`, `kube-proxy`.
pub fn program(bed: &Bed, name: &str, program: &str) -> Result<Daemon> {
    Ok(daemon(bed, name, program, holder(bed, name)?))
}

fn daemon(bed: &Bed, node: &str, name: &str, holder: Pid) -> Daemon {
    Daemon {
        name: name.to_owned(),
        directory: bed.plan.node_directory(node),
        place: Place::Node(holder),
        cgroup: cgroup(bed, node),
    }
}

fn cgroup(bed: &Bed, node: &str) -> Cgroup {
    Cgroup::of(&bed.plan.bed, Some(node))
}

fn node_addresses(bed: &Bed, node: &NodeRecord) -> String {
    let address: Ipv4Addr = bed.plan.node(node.number);
    if bed.shape.dual_stack { format!("{address},{}", bed.plan.beside(address)) } else { address.to_string() }
}

fn configure(bed: &Bed, node: &NodeRecord) -> Result<()> {
    let directory = bed.plan.node_directory(&node.shape.name);
    let containerd =
        Containerd::new(&bed.parts, Path::new("/var/lib/containerd"), Path::new("/run/containerd"))?;
    fs::write(directory.join("containerd.toml"), containerd.config(PAUSE))?;
    let kubelet = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": { "anonymous": { "enabled": true }, "webhook": { "enabled": false } },
        "authorization": { "mode": "AlwaysAllow" },
        "cgroupDriver": "cgroupfs",
        "cgroupsPerQOS": false,
        "enforceNodeAllocatable": [],
        "failCgroupV1": false,
        "failSwapOn": false,
        "localStorageCapacityIsolation": false,
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "evictionHard": { "memory.available": "10Mi", "nodefs.available": "1%" },
        "imageGCHighThresholdPercent": 100,
        "maxPods": 200,
        "resolvConf": "",
        "volumePluginDir": "/var/lib/kubelet/volume-plugins",
        "staticPodPath": "/etc/kubernetes/manifests",
        "nodeStatusUpdateFrequency": "5s",
        "registerNode": true,
    });
    fs::write(directory.join("kubelet.json"), serde_json::to_string_pretty(&kubelet)?)?;
    let pods = if bed.shape.dual_stack {
        format!("{},{POD_CIDR_V6}", bed.shape.pod_cidr)
    } else {
        bed.shape.pod_cidr.to_string()
    };
    let proxy = json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": { "kubeconfig": bed.plan.kubeconfig_inside("proxy") },
        "clusterCIDR": pods,
        "hostnameOverride": node.shape.name,
        "mode": bed.shape.kube_proxy.mode(),
        "iptables": { "minSyncPeriod": "0s" },
        "nftables": { "minSyncPeriod": "0s" },
        // These belong to the machine's own network namespace and can't be set from another.
        "conntrack": {
            "maxPerCore": 0, "min": 0,
            "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s",
        },
    });
    fs::write(directory.join("kube-proxy.json"), serde_json::to_string_pretty(&proxy)?)?;
    Ok(())
}

/// What Debian's or Kubernetes' package would have put on the node before flannel came.
fn install_cni_plugins(bed: &Bed, node: &NodeRecord) -> Result<()> {
    let root = root(bed, &node.shape.name)?;
    fs::create_dir_all(root.join("etc/kubernetes/manifests"))?;
    for plugin in ["bandwidth", "bridge", "host-local", "loopback", "portmap", "tuning"] {
        fs::copy(bed.parts.program("cni-plugins", plugin)?, root.join("opt/cni/bin").join(plugin))?;
    }
    Ok(())
}
