//! What is written to nodes. Pure.

use flannel_migration_protocol::{
    Epoch, Failures, Goal, Grant, Network, NodeView, Request, State, Strategy, keys,
};
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use crate::cluster::NodeFacts;
use crate::plan::back_off;

/// Whether the lease `epoch` is in force and its agent has answered with one of `states`.
#[must_use]
pub fn holds(view: &NodeView, epoch: Epoch, states: &[State]) -> bool {
    view.granted().is_some_and(|grant| grant.epoch == epoch)
        && view.answered().is_some_and(|state| states.contains(&state))
}

/// Gives a lease to a node that is at rest where the lease begins; `None` when it isn't, or isn't to be started.
#[must_use]
pub fn granted(now: &NodeFacts, grant: &Grant) -> Option<Value> {
    let view = &now.view;
    let (rest, held) = match grant.goal {
        Goal::Migrate => (State::Flannel, view.paused || !view.request.is_absent()),
        Goal::Rollback => {
            (State::Calico, view.request.get().map_or(view.paused, |own| *own != Request::Rollback))
        }
    };
    let newer = view.last_epoch().is_none_or(|last| last < grant.epoch);
    let free = view.lease.is_absent() && view.state.get() == Some(&rest) && now.ready && newer && !held;
    let text = serde_json::to_string(grant).ok()?;
    free.then(|| {
        json!({ "metadata": {
            "labels": { keys::LEASE: grant.epoch.to_string() },
            "annotations": { keys::GRANT: text },
        } })
    })
}

/// Keeps new pods off a node that is being cleared; those of DaemonSets, which tolerate a cordon, by a taint when `tainted`.
#[must_use]
pub fn cordoned(now: &NodeFacts, epoch: Epoch, tainted: bool) -> Option<Value> {
    if !holds(&now.view, epoch, &[State::Prepared]) {
        return None;
    }
    let (mut annotations, mut spec) = (Map::new(), Map::new());
    if !now.unschedulable {
        annotations.insert(keys::CORDONED.to_owned(), "true".into());
        spec.insert("unschedulable".to_owned(), true.into());
    }
    if tainted && without_taint(now).is_none() {
        let mut taints = now.taints.clone();
        taints.push(json!({ "key": keys::CLEARING, "effect": "NoSchedule" }));
        spec.insert("taints".to_owned(), taints.into());
    }
    (!spec.is_empty()).then(|| json!({ "metadata": { "annotations": annotations }, "spec": spec }))
}

/// The node's taints without ours; `None` when ours isn't there.
#[must_use]
pub fn without_taint(now: &NodeFacts) -> Option<Value> {
    let others: Vec<&Value> =
        now.taints.iter().filter(|taint| taint.get("key") != Some(&keys::CLEARING.into())).collect();
    (others.len() < now.taints.len()).then(|| json!(others))
}

/// Whether the lease in force is to be carried out in place.
#[must_use]
pub fn in_place(view: &NodeView) -> bool {
    view.granted().is_some_and(|grant| grant.strategy == Strategy::InPlace)
}

/// Whether no pod of a node has to leave before its switch: in place, where its agent can adopt them all.
#[must_use]
pub fn all_stay(view: &NodeView) -> bool {
    let answered = view.answered() == Some(State::Prepared);
    in_place(view) && answered && view.report.get().is_some_and(|report| report.evict.is_empty())
}

/// Lets flannel's pod leave a prepared node.
#[must_use]
pub fn cleared(now: &NodeFacts, epoch: Epoch) -> Option<Value> {
    holds(&now.view, epoch, &[State::Prepared]).then(|| labelled(Network::None))
}

/// Takes a lease back whose agent has changed nothing, and can't: flannel's pod may still run.
#[must_use]
pub fn withdrawn(now: &NodeFacts, epoch: Epoch, failures: Option<Failures>) -> Option<Value> {
    let unchanged = holds(&now.view, epoch, &[State::Preparing, State::Prepared])
        && now.view.network.get() == Some(&Network::Flannel);
    unchanged.then(|| released(now, failures, None))
}

/// Lets Calico's pod come to a node whose addresses are registered.
#[must_use]
pub fn registered(now: &NodeFacts, epoch: Epoch) -> Option<Value> {
    holds(&now.view, epoch, &[State::Verifying]).then(|| labelled(Network::Calico))
}

/// Lets Calico's pod leave a node that goes back.
#[must_use]
pub fn retreated(now: &NodeFacts) -> Option<Value> {
    let reverting = now.view.answered() == Some(State::Reverting);
    (reverting && now.view.network.get() != Some(&Network::None)).then(|| labelled(Network::None))
}

/// Lets flannel's pod come back to a node that is flannel's again, under its lease still.
#[must_use]
pub fn returned(now: &NodeFacts, epoch: Epoch) -> Option<Value> {
    let back = holds(&now.view, epoch, &[State::Flannel]);
    (back && now.view.network.get() != Some(&Network::Flannel)).then(|| labelled(Network::Flannel))
}

/// Takes the lease back from a node that is flannel's again.
#[must_use]
pub fn given_back(now: &NodeFacts, epoch: Epoch, failures: Option<Failures>) -> Option<Value> {
    holds(&now.view, epoch, &[State::Flannel]).then(|| released(now, failures, Some(Network::Flannel)))
}

/// Lets pods come to a node that is Calico's, verified, under its lease still; `None` when we keep none away.
#[must_use]
pub fn reopened(now: &NodeFacts, epoch: Epoch) -> Option<Value> {
    let spec = schedulable(now);
    let closed = holds(&now.view, epoch, &[State::Calico]) && !spec.is_empty();
    closed.then(|| json!({ "metadata": { "annotations": { keys::CORDONED: null } }, "spec": spec }))
}

/// Takes the lease back from a node that is Calico's, verified.
#[must_use]
pub fn settled(now: &NodeFacts, epoch: Epoch) -> Option<Value> {
    holds(&now.view, epoch, &[State::Calico]).then(|| released(now, None, Some(Network::Calico)))
}

/// Corrects the network label of a node at rest without a lease.
#[must_use]
pub fn relabelled(now: &NodeFacts, network: Network) -> Option<Value> {
    (now.view.lease.is_absent() && now.view.network.get() != Some(&network)).then(|| labelled(network))
}

/// Sets the network label.
#[must_use]
pub fn labelled(network: Network) -> Value {
    json!({ "metadata": { "labels": { keys::NETWORK: network.as_str() } } })
}

/// Takes lease, grant and taint away, uncordons if it was us who cordoned, notes or forgets failures, and says whose network it is: one patch.
#[must_use]
pub fn released(now: &NodeFacts, failures: Option<Failures>, network: Option<Network>) -> Value {
    let failures = failures.and_then(|failures| serde_json::to_string(&failures).ok());
    let network = network.or(now.view.network.get().copied()).map(Network::as_str);
    let metadata = json!({
        "labels": { keys::LEASE: null, keys::NETWORK: network },
        "annotations": { keys::GRANT: null, keys::CORDONED: null, keys::FAILURES: failures },
    });
    let spec = schedulable(now);
    if spec.is_empty() {
        json!({ "metadata": metadata })
    } else {
        json!({ "metadata": metadata, "spec": spec })
    }
}

/// What is to be changed of a node's spec so that it takes pods again: only what was us.
fn schedulable(now: &NodeFacts) -> Map<String, Value> {
    let mut spec = Map::new();
    if now.view.cordoned {
        spec.insert("unschedulable".to_owned(), Value::Null);
    }
    if let Some(taints) = without_taint(now) {
        spec.insert("taints".to_owned(), taints);
    }
    spec
}

/// One more failure: tried again after a pause that grows.
#[must_use]
pub fn failure(view: &NodeView, epoch: Epoch, touched: bool, reason: &str, message: &str) -> Failures {
    let before = view.failures.get();
    let count = before.map_or(0, |failures| failures.count).saturating_add(1);
    let now = Timestamp::now();
    Failures {
        count,
        last_epoch: epoch,
        retry_after: now.checked_add(back_off(count)).unwrap_or(now),
        touched: touched || before.is_some_and(|failures| failures.touched),
        reason: reason.to_owned(),
        message: message.chars().take(500).collect(),
    }
}

#[cfg(test)]
mod tests {
    use flannel_migration_protocol::{Evict, Field, Report};

    use super::*;

    #[test]
    fn only_what_we_cordoned_is_uncordoned() {
        let mut node = NodeFacts { unschedulable: true, ..NodeFacts::default() };
        assert!(released(&node, None, None).get("spec").is_none());
        node.view.cordoned = true;
        assert_eq!(released(&node, None, None)["spec"], json!({ "unschedulable": null }));
    }

    #[test]
    fn a_verified_node_takes_pods_again_before_its_lease_ends_and_only_what_was_us_is_undone() {
        let mut node = prepared();
        node.unschedulable = true;
        node.view.cordoned = true;
        node.taints = vec![json!({ "key": keys::CLEARING, "effect": "NoSchedule" })];
        assert_eq!(reopened(&node, Epoch::FIRST), None, "not verified");
        node.view.state = Field::Present(State::Calico);
        if let Field::Present(report) = &mut node.view.report {
            report.state = State::Calico;
        }
        let patch = reopened(&node, Epoch::FIRST).unwrap();
        assert_eq!(patch["spec"], json!({ "unschedulable": null, "taints": [] }));
        assert_eq!(patch["metadata"], json!({ "annotations": { keys::CORDONED: null } }));
        node.view.cordoned = false;
        node.taints.clear();
        assert_eq!(reopened(&node, Epoch::FIRST), None, "somebody else's cordon stays");
    }

    #[test]
    fn the_taint_comes_with_the_cordon_and_goes_with_the_lease_and_other_taints_stay() {
        let (mut node, epoch) = (prepared(), Epoch::FIRST);
        let other = json!({ "key": "dedicated", "value": "x", "effect": "NoExecute" });
        let ours = json!({ "key": keys::CLEARING, "effect": "NoSchedule" });
        node.taints = vec![other.clone()];
        assert_eq!(cordoned(&node, epoch, false).unwrap()["spec"], json!({ "unschedulable": true }));
        let both = cordoned(&node, epoch, true).unwrap();
        assert_eq!(both["spec"], json!({ "unschedulable": true, "taints": [other, ours] }));
        node.unschedulable = true;
        let only = cordoned(&node, epoch, true).unwrap();
        assert_eq!(only, json!({ "metadata": { "annotations": {} }, "spec": { "taints": [other, ours] } }));
        node.taints.push(ours);
        assert_eq!(cordoned(&node, epoch, true), None);
        assert_eq!(released(&node, None, None)["spec"], json!({ "taints": [other] }));
    }

    fn prepared() -> NodeFacts {
        let grant = r#"{"epoch":1,"fence":1,"goal":"migrate","strategy":"in-place","budgetSeconds":1,"flannel":{"networks":[],"vni":1,"port":1,"mtu":1450,"cniConfDir":""},"calico":{"cniConfName":"","cniConfTemplate":"","mtu":1450,"healthPort":1,"kubeServiceAddress":""}}"#;
        let report = r#"{"epoch":1,"state":"prepared","since":"2026-01-01T00:00:00Z","reason":"Prepared"}"#;
        let texts = |pairs: &[(&str, &str)]| {
            pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
        };
        let labels = texts(&[(keys::LEASE, "1"), (keys::STATE, "prepared"), (keys::NETWORK, "flannel")]);
        let annotations = texts(&[(keys::GRANT, grant), (keys::REPORT, report)]);
        NodeFacts { view: NodeView::parse(&labels, &annotations), ..NodeFacts::default() }
    }

    #[test]
    fn all_pods_stay_only_where_the_agent_has_answered_this_lease_that_it_adopts_them() {
        let mut node = prepared();
        assert!(all_stay(&node.view));
        let change = |node: &mut NodeFacts, report: &dyn Fn(&mut Report), grant: &dyn Fn(&mut Grant)| {
            if let (Field::Present(now), Field::Present(given)) =
                (&mut node.view.report, &mut node.view.grant)
            {
                report(now);
                grant(given);
            }
        };
        let evict = Evict { namespace: "n".into(), pod: "p".into(), uid: "u".into(), reason: "r".into() };
        change(&mut node, &|report| report.evict = vec![evict.clone()], &|_| {});
        assert!(!all_stay(&node.view), "one can't be adopted");
        change(&mut node, &|report| report.evict.clear(), &|grant| grant.strategy = Strategy::Drain);
        assert!(!all_stay(&node.view), "a drain evicts others");
        change(&mut node, &|report| report.epoch = Epoch::new(7), &|grant| {
            grant.strategy = Strategy::InPlace;
        });
        assert!(!all_stay(&node.view), "an answer to another lease");
    }

    #[test]
    fn releasing_removes_lease_and_grant_and_forgets_failures() {
        let patch = released(&NodeFacts::default(), None, Some(Network::Calico));
        assert_eq!(patch["metadata"]["labels"], json!({ keys::LEASE: null, keys::NETWORK: "calico" }));
        assert_eq!(
            patch["metadata"]["annotations"],
            json!({ keys::GRANT: null, keys::CORDONED: null, keys::FAILURES: null })
        );
    }

    #[test]
    fn failures_add_up_and_back_off() {
        let epoch = Epoch::new(3).unwrap();
        let mut view = NodeView::default();
        let first = failure(&view, epoch, false, "RpFilterNotStrict", "set it");
        assert_eq!((first.count, first.touched, first.last_epoch), (1, false, epoch));
        view.failures =
            flannel_migration_protocol::Field::Present(Failures { touched: true, ..first.clone() });
        let second = failure(&view, epoch, false, "X", "");
        assert!(second.count == 2 && second.touched && second.retry_after > first.retry_after);
    }
}
