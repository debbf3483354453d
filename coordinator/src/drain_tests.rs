use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use http::{Method, Request, Response};
use kube::client::Body;
use rstest::rstest;
use serde_json::json;

use super::*;
use crate::leader::Leadership;

fn pod(yaml: &str) -> Pod {
    serde_saphyr::from_str(yaml).unwrap()
}

const REPLICA: &str = "metadata: {name: p, uid: u, ownerReferences: [{kind: ReplicaSet, controller: true, apiVersion: v1, name: r, uid: x}]}";

#[rstest]
#[case::of_a_deployment(REPLICA, true)]
#[case::of_a_daemon_set(
    "metadata: {ownerReferences: [{kind: DaemonSet, controller: true, apiVersion: v1, name: r, uid: x}]}",
    false
)]
#[case::that_nobody_makes_again("metadata: {name: bare}", false)]
#[case::owned_but_not_controlled(
    "metadata: {ownerReferences: [{kind: Node, apiVersion: v1, name: r, uid: x}]}",
    false
)]
#[case::on_the_hosts_network(&format!("{REPLICA}\nspec: {{containers: [], hostNetwork: true}}"), false)]
#[case::finished(&format!("{REPLICA}\nstatus: {{phase: Succeeded}}"), false)]
#[case::static_pod("metadata: {annotations: {kubernetes.io/config.mirror: x}}", false)]
fn a_drain_moves_what_comes_back_elsewhere(#[case] yaml: &str, #[case] leaves: bool) {
    assert_eq!(must_leave(&pod(yaml), Strategy::Drain, false), leaves);
    assert!(!must_leave(&pod(yaml), Strategy::InPlace, false));
}

#[test]
fn what_cannot_be_adopted_leaves_under_both_strategies() {
    for strategy in [Strategy::Drain, Strategy::InPlace] {
        assert!(must_leave(&pod("metadata: {name: bare}"), strategy, true));
        assert!(!must_leave(
            &pod("metadata: {annotations: {kubernetes.io/config.mirror: x}}"),
            strategy,
            true
        ));
    }
}

#[test]
fn only_adopted_pods_that_somebody_makes_again_are_left_overs() {
    let adopted = |uid: &str| {
        vec![Adopted {
            sandbox: String::new(),
            ip: vec![],
            namespace: String::new(),
            pod: String::new(),
            uid: uid.into(),
        }]
    };
    assert!(is_left_over(&pod(REPLICA), &adopted("u")));
    assert!(!is_left_over(&pod(REPLICA), &adopted("another")));
    assert!(!is_left_over(&pod("metadata: {name: bare, uid: u}"), &adopted("u")));
}

#[test]
fn what_is_in_the_way_is_named() {
    let pod = PodName { namespace: "default".into(), name: "web-0".into(), uid: "u".into() };
    let why = "The disruption budget web needs 3 healthy pods and has 3 currently".to_owned();
    let blocked = Blocked::InTime { limit: Duration::from_secs(5), pods: [(pod, why)].into() };
    let text = describe(&blocked);
    assert!(text.contains("default/web-0") && text.contains("budget web"), "{text}");
}

/// An API server that refuses the first `conflicts` evictions with 409, and knows a pod of this UID; evictions are counted.
fn server(conflicts: usize, uid: &'static str) -> (Client, Arc<AtomicUsize>) {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let service = tower::service_fn(move |request: Request<Body>| {
        let (status, body) = if request.method() == Method::POST {
            let code = if count.fetch_add(1, Ordering::Relaxed) < conflicts { 409 } else { 201 };
            let word = if code == 409 { "Failure" } else { "Success" };
            let status = json!({ "kind": "Status", "apiVersion": "v1", "status": word, "reason": "Conflict", "code": code });
            (code, status)
        } else {
            let pod = json!({ "metadata": { "name": "web-0", "namespace": "default", "uid": uid } });
            (200, json!({ "kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": [pod] }))
        };
        let answer = Response::builder().status(status).body(Body::from(body.to_string().into_bytes()));
        std::future::ready(answer)
    });
    (Client::new(service, "default"), asked)
}

#[rstest]
#[case::that_met_another_write("u", 2)]
#[case::of_a_pod_that_has_a_successor_is_over("successor", 1)]
#[tokio::test(start_paused = true)]
async fn an_eviction(#[case] there: &'static str, #[case] evictions: usize) {
    let (client, asked) = server(1, there);
    let writer = Writer::new(client, Leadership::held_for_ever(), None);
    let pod = PodName { namespace: "default".into(), name: "web-0".into(), uid: "u".into() };
    let (_, answer) = ask(&writer, &pod, Instant::now() + Duration::from_mins(1)).await;
    assert!(matches!(answer, Ok(None)), "{answer:?}");
    assert_eq!(asked.load(Ordering::Relaxed), evictions);
}

fn evict(uid: &str) -> Evict {
    Evict { namespace: "d".into(), pod: "p".into(), uid: uid.into(), reason: "MoreInterfaces".into() }
}

#[test]
fn a_static_pod_is_known_by_the_kubelets_uid_and_cannot_be_moved() {
    let listed = [evict("of-the-kubelet")];
    let with_uid = |uid: &str| {
        let text = format!(
            "metadata: {{name: fixed, namespace: d, uid: of-the-api, annotations: {{kubernetes.io/config.mirror: {uid}}}}}"
        );
        vec![Arc::new(pod(&text)), Arc::new(pod("metadata: {name: other, uid: of-the-kubelet}"))]
    };
    let held = unmovable(&with_uid("of-the-kubelet"), &listed);
    let text = describe(&Blocked::Static(held));
    assert!(text.contains("d/fixed (MoreInterfaces)") && !text.contains("other"), "{text}");
    assert!(unmovable(&with_uid("another"), &listed).is_empty());
}

#[test]
fn a_daemon_set_makes_its_pod_again_on_a_cordoned_node() {
    let of = |kind: &str| {
        let owner = format!("{{kind: {kind}, controller: true, apiVersion: v1, name: r, uid: x}}");
        vec![Arc::new(pod(&format!("metadata: {{uid: u, ownerReferences: [{owner}]}}")))]
    };
    let listed = [evict("u")];
    assert!(come_back(&of("DaemonSet"), &listed));
    assert!(!come_back(&of("DaemonSet"), &[]));
    assert!(!come_back(&of("ReplicaSet"), &listed));
}
