//! What an agent may do with the token of its own pod, and what the API server refuses it, whatever it runs.

use flannel_migration_tests::bed::Bed;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

use super::{AGENT, items};

const MERGE: &str = "application/merge-patch+json";
const STRATEGIC: &str = "application/strategic-merge-patch+json";

/// The token that the kubelet of `node` gives its agent: bound to the pod, and so to the node.
fn token(bed: &Bed, node: &str) -> String {
    let (selector, field) = (format!("k8s-app={AGENT}"), format!("spec.nodeName={node}"));
    let pods = bed.get(&["-n", "kube-system", "pods", "-l", &selector, "--field-selector", &field]).unwrap();
    let pod = items(&pods)[0]["metadata"]["name"].as_str().unwrap().to_owned();
    let bound = format!("--bound-object-name={pod}");
    let args = ["-n", "kube-system", "create", "token", AGENT, "--bound-object-kind=Pod", &bound];
    bed.kubectl(&args).unwrap().trim().to_owned()
}

async fn client(bed: &Bed, token: &str) -> Client {
    let mut kubeconfig = Kubeconfig::read_from(bed.plan.kubeconfig()).unwrap();
    for user in &mut kubeconfig.auth_infos {
        user.auth_info =
            Some(kube::config::AuthInfo { token: Some(token.to_owned().into()), ..Default::default() });
    }
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap();
    Client::try_from(config).unwrap()
}

/// The status code of one request.
async fn attempt(client: &Client, (method, path, kind, body): (&str, &str, &str, &str)) -> (u16, String) {
    let request = http::Request::builder().method(method).uri(path).header("Content-Type", kind);
    let answer = client.request_text(request.body(body.as_bytes().to_vec()).unwrap()).await;
    match answer {
        Ok(text) => (200, text),
        Err(kube::Error::Api(status)) => (status.code, status.message),
        Err(error) => panic!("{method} {path}: {error}"),
    }
}

fn metadata(part: &str, key: &str, value: &str) -> String {
    format!(r#"{{"metadata":{{"{part}":{{"{key}":{value}}}}}}}"#)
}

/// Each must be refused for lack of a right, by RBAC or by the admission policy.
fn denied() -> Vec<(&'static str, &'static str, &'static str, String)> {
    const N1: &str = "/api/v1/nodes/n1";
    const N2: &str = "/api/v1/nodes/n2";
    const N1_STATUS: &str = "/api/v1/nodes/n1/status";
    const N2_STATUS: &str = "/api/v1/nodes/n2/status";
    let network = "projectcalico.org/node-network-during-migration";
    let mut attempts = vec![
        // Another node.
        ("PATCH", N2, MERGE, metadata("labels", "flannel-migration/state", r#""calico""#)),
        ("PATCH", N2_STATUS, MERGE, metadata("labels", "flannel-migration/state", r#""calico""#)),
        ("PATCH", N2_STATUS, MERGE, metadata("annotations", "flannel-migration/report", r#""{}""#)),
        (
            "PATCH",
            N2_STATUS,
            STRATEGIC,
            r#"{"status":{"conditions":[{"type":"NetworkMigrated","status":"True"}]}}"#.to_owned(),
        ),
        // The node itself, even where the key is its own.
        ("PATCH", N1, MERGE, metadata("labels", "flannel-migration/state", r#""calico""#)),
        ("PATCH", N1, MERGE, r#"{"spec":{"unschedulable":true}}"#.to_owned()),
        ("PATCH", N1, MERGE, r#"{"spec":{"taints":[{"key":"x","effect":"NoSchedule"}]}}"#.to_owned()),
        ("PATCH", N1_STATUS, MERGE, r#"{"metadata":{"finalizers":["example.org/x"]}}"#.to_owned()),
        ("PATCH", N1_STATUS, MERGE, r#"{"status":{"capacity":{"cpu":"99"}}}"#.to_owned()),
        (
            "PATCH",
            N1_STATUS,
            STRATEGIC,
            r#"{"status":{"conditions":[{"type":"Ready","status":"False"}]}}"#.to_owned(),
        ),
        ("PUT", N1, "application/json", "{}".to_owned()),
        ("PATCH", "/apis/batch/v1/namespaces/kube-system/jobs/flannel-migration", MERGE, "{}".to_owned()),
        (
            "POST",
            "/api/v1/namespaces/kube-system/serviceaccounts/flannel-migration-controller/token",
            "application/json",
            r#"{"apiVersion":"authentication.k8s.io/v1","kind":"TokenRequest","spec":{"audiences":[]}}"#
                .to_owned(),
        ),
    ];
    // Foreign keys on its own node.
    for key in [
        "flannel-migration/lease",
        "flannel-migration/pause",
        network,
        "kubernetes.io/hostname",
        "node-role.kubernetes.io/control-plane",
    ] {
        attempts.push(("PATCH", N1_STATUS, MERGE, metadata("labels", key, r#""7""#)));
    }
    for key in [
        "flannel-migration/grant",
        "flannel-migration/cordoned",
        "flannel-migration/failures",
        "flannel-migration/request",
        "flannel-migration/strategy",
        "projectcalico.org/IPv4Address",
    ] {
        attempts.push(("PATCH", N1_STATUS, MERGE, metadata("annotations", key, r#""7""#)));
    }
    attempts.push(("PATCH", N1_STATUS, MERGE, metadata("labels", "kubernetes.io/hostname", "null")));
    // What isn't its own: pods, leases, addresses, configuration, secrets.
    for path in [
        "/api/v1/namespaces/kube-system/secrets",
        "/api/v1/secrets",
        "/api/v1/namespaces/kube-system/configmaps",
        "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases",
        "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/n2",
        "/apis/crd.projectcalico.org/v1/ipamblocks",
        "/apis/crd.projectcalico.org/v1/ippools",
        "/apis/apps/v1/daemonsets",
        "/api/v1/nodes/n2/proxy/pods",
    ] {
        attempts.push(("GET", path, MERGE, String::new()));
    }
    for path in [
        N1,
        N2,
        "/api/v1/namespaces/probe/pods",
        "/apis/crd.projectcalico.org/v1/ipamblocks",
        "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases/flannel-migration",
        "/apis/apps/v1/namespaces/kube-system/daemonsets/flannel-migration-agent",
    ] {
        attempts.push(("DELETE", path, MERGE, String::new()));
    }
    attempts
}

/// Tries what an agent must not do, and what it must. `n1` must be at rest.
pub fn expect_confined(bed: &Bed) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let token = token(bed, "n1");
    let unbound = bed.kubectl(&["-n", "kube-system", "create", "token", AGENT]).unwrap();
    runtime.block_on(async {
        let agent = client(bed, &token).await;
        let attempts = denied();
        for (method, path, kind, body) in &attempts {
            let (code, message) = attempt(&agent, (method, path, kind, body)).await;
            // 422 is how an admission policy refuses, with its own words.
            let refused = code == 403 || code == 422 && message.contains("an agent");
            assert!(refused, "{method} {path} {body}: {code} {message}");
        }
        // Its own key, as it is: allowed, so that the others weren't refused for something else.
        let own = metadata("labels", "flannel-migration/state", r#""calico""#);
        let own = ("PATCH", "/api/v1/nodes/n1/status", MERGE, own.as_str());
        let (code, message) = attempt(&agent, own).await;
        assert_eq!(code, 200, "{message}");
        // The same account without a pod has no node.
        let (code, message) = attempt(&client(bed, unbound.trim()).await, own).await;
        assert!(code == 403 || code == 422, "{code} {message}");
        eprintln!("{} attempts of an agent were denied", attempts.len() + 1);
    });
}
