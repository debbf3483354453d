//! The control plane: etcd, API server, controller manager, scheduler, in a namespace of their own.

use std::{fs, time::Duration};

use anyhow::{Context, Result};

use super::{
    Bed,
    cgroup::Cgroup,
    daemon::{Daemon, Place},
    layout::{API_PORT, POD_CIDR_V6, SERVICE_CIDR, SERVICE_CIDR_V6},
    net, secrets,
};
use crate::run;

/// The part's name in namespaces and groups.
pub const PART: &str = "control";

/// Starts all of it; [`wait`] waits until the API answers.
pub fn start(bed: &Bed) -> Result<()> {
    let nodes: Vec<String> = bed.shape.nodes.iter().map(|node| node.name.clone()).collect();
    secrets::write(&bed.plan, &nodes)?;
    net::connect(&bed.plan, PART, bed.plan.control())?;
    Cgroup::of(&bed.plan.bed, Some(PART)).create()?;
    start_etcd(bed)?;
    start_apiserver(bed)?;
    start_controllers(bed)
}

/// Starts the controllers and the scheduler.
pub fn start_controllers(bed: &Bed) -> Result<()> {
    let kubeconfig = |user: &str| format!("--kubeconfig={}", bed.plan.kubeconfig_inside(user).display());
    let secret = |name: &str| bed.plan.secrets().join(name).display().to_string();
    let mut manager = vec![
        kubeconfig("controller-manager"),
        "--allocate-node-cidrs=true".to_owned(),
        "--use-service-account-credentials=true".to_owned(),
        "--leader-elect=false".to_owned(),
        format!("--root-ca-file={}", secret("ca.crt")),
        format!("--service-account-private-key-file={}", secret("accounts.key")),
        // A node that ends is noticed within seconds, not minutes.
        "--node-monitor-grace-period=20s".to_owned(),
    ];
    if bed.shape.dual_stack {
        manager.push(format!("--cluster-cidr={},{POD_CIDR_V6}", bed.shape.pod_cidr));
        manager.push(format!("--service-cluster-ip-range={SERVICE_CIDR},{SERVICE_CIDR_V6}"));
        manager.push(format!("--node-cidr-mask-size-ipv4={}", bed.shape.node_prefix));
        manager.push("--node-cidr-mask-size-ipv6=64".to_owned());
    } else {
        manager.push(format!("--cluster-cidr={}", bed.shape.pod_cidr));
        manager.push(format!("--service-cluster-ip-range={SERVICE_CIDR}"));
        manager.push(format!("--node-cidr-mask-size={}", bed.shape.node_prefix));
    }
    daemon(bed, "kube-controller-manager").start(&bed.program("kube-controller-manager")?, &manager)?;
    let scheduler = [kubeconfig("scheduler"), "--leader-elect=false".to_owned()];
    daemon(bed, "kube-scheduler").start(&bed.program("kube-scheduler")?, &scheduler)
}

/// Waits until the API server says that it is ready.
pub fn wait(bed: &Bed) -> Result<()> {
    run::wait_for("the API server is ready", Duration::from_secs(90), || {
        bed.kubectl(&["get", "--raw", "/readyz"]).map(|answer| answer.trim() == "ok")
    })
    .with_context(|| format!("see {}", daemon(bed, "kube-apiserver").log().display()))
}

/// Stops the API server alone.
pub fn stop_apiserver(bed: &Bed) -> Result<()> {
    daemon(bed, "kube-apiserver").stop()
}

/// Starts the API server again.
pub fn start_apiserver(bed: &Bed) -> Result<()> {
    let secret = |name: &str| bed.plan.secrets().join(name).display().to_string();
    let services = if bed.shape.dual_stack {
        format!("{SERVICE_CIDR},{SERVICE_CIDR_V6}")
    } else {
        SERVICE_CIDR.to_owned()
    };
    let arguments = [
        format!("--advertise-address={}", bed.plan.control()),
        format!("--secure-port={API_PORT}"),
        "--etcd-servers=http://127.0.0.1:2379".to_owned(),
        format!("--service-cluster-ip-range={services}"),
        format!("--tls-cert-file={}", secret("apiserver.crt")),
        format!("--tls-private-key-file={}", secret("apiserver.key")),
        format!("--token-auth-file={}", secret("tokens.csv")),
        "--authorization-mode=Node,RBAC".to_owned(),
        "--enable-admission-plugins=NodeRestriction".to_owned(),
        "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
        format!("--service-account-key-file={}", secret("accounts.pub")),
        format!("--service-account-signing-key-file={}", secret("accounts.key")),
        "--allow-privileged=true".to_owned(),
        // Node names are in no DNS.
        "--kubelet-preferred-address-types=InternalIP".to_owned(),
        format!("--cert-dir={}", bed.plan.directory().join(PART).join("certificates").display()),
        format!("--audit-log-path={}", bed.plan.directory().join(PART).join("audit.log").display()),
        format!("--audit-policy-file={}", audit_policy(bed)?),
    ];
    daemon(bed, "kube-apiserver").start(&bed.program("kube-apiserver")?, &arguments)
}

/// Stops the controllers and the scheduler: nothing but the API server is left, and objects are what whoever writes them says.
pub fn stop_controllers(bed: &Bed) -> Result<()> {
    daemon(bed, "kube-controller-manager").stop()?;
    daemon(bed, "kube-scheduler").stop()
}

/// Stops etcd alone.
pub fn stop_etcd(bed: &Bed) -> Result<()> {
    daemon(bed, "etcd").stop()
}

/// Starts etcd, again with what it stored.
pub fn start_etcd(bed: &Bed) -> Result<()> {
    let data = bed.plan.directory().join(PART).join("etcd");
    fs::create_dir_all(&data)?;
    let arguments = [
        format!("--data-dir={}", data.display()),
        // The test bed is thrown away: what a power cut would lose doesn't matter, the speed does.
        "--unsafe-no-fsync".to_owned(),
        "--log-level=warn".to_owned(),
    ];
    daemon(bed, "etcd").start(&bed.program("etcd")?, &arguments)
}

/// Who wrote what: the tests compare verbs used with verbs granted.
fn audit_policy(bed: &Bed) -> Result<String> {
    let path = bed.plan.directory().join(PART).join("audit-policy.yaml");
    fs::create_dir_all(path.parent().context("no directory for the audit policy")?)?;
    let policy = serde_json::json!({
        "apiVersion": "audit.k8s.io/v1",
        "kind": "Policy",
        "omitStages": ["RequestReceived", "ResponseStarted"],
        "rules": [
            { "level": "Metadata", "userGroups": ["system:serviceaccounts:kube-system"] },
            { "level": "None" },
        ],
    });
    fs::write(&path, serde_json::to_string(&policy)?)?;
    Ok(path.display().to_string())
}

fn daemon(bed: &Bed, name: &str) -> Daemon {
    Daemon {
        name: name.to_owned(),
        directory: bed.plan.directory().join(PART),
        place: Place::Netns(bed.plan.netns(PART)),
        cgroup: Cgroup::of(&bed.plan.bed, Some(PART)),
    }
}
