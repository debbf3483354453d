use std::collections::BTreeMap;

use flannel_migration_protocol::keys;
use rstest::rstest;

use super::*;
use crate::journal::Journal;

fn grant(epoch: u64, goal: &str) -> String {
    serde_json::json!({
        "epoch": epoch, "fence": 1, "goal": goal, "strategy": "in-place", "budgetSeconds": 60,
        "flannel": {"networks": ["10.244.0.0/16"], "vni": 1, "port": 8472, "mtu": 1450, "cniConfDir": "/etc/cni/net.d"},
        "calico": {"cniConfName": "10-calico.conflist", "cniConfTemplate": "{}", "mtu": 1450, "healthPort": 9099,
                   "kubeServiceAddress": "10.96.0.1:443"},
    })
    .to_string()
}

fn entry(state: State, epoch: Option<u64>) -> Entry {
    let directory = tempfile::tempdir().unwrap();
    let mut entry = Journal::open(directory.path(), "n").unwrap().entry;
    entry.state = state;
    entry.epoch = epoch.and_then(Epoch::new);
    entry.grant = epoch.map(|epoch| serde_json::from_str(&grant(epoch, "migrate")).unwrap());
    entry.switched = Some(Timestamp::UNIX_EPOCH);
    entry
}

fn observed(labels: &[(&str, &str)], goal: &str, seconds: i64, felix: Felix, flanneld: bool) -> Observed {
    let labels: BTreeMap<String, String> =
        labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    let mut annotations = BTreeMap::new();
    if let Some(epoch) = labels.get(keys::LEASE).and_then(|lease| lease.parse().ok()) {
        annotations.insert(keys::GRANT.to_owned(), grant(epoch, goal));
    }
    Observed {
        view: NodeView::parse(&labels, &annotations),
        flanneld,
        flannel_here: true,
        flannel_files: false,
        felix,
        kept_in_use: false,
        now: Timestamp::from_second(seconds).unwrap(),
    }
}

fn name(next: &Next) -> String {
    let text = format!("{next:?}");
    text.split(['(', '{', ' ']).next().unwrap_or_default().to_owned()
}

#[rstest]
#[case::no_lease(State::Flannel, None, &[], "Wait")]
#[case::first_lease(State::Flannel, None, &[(keys::LEASE, "1")], "Prepare")]
#[case::newer_lease(State::Flannel, Some(3), &[(keys::LEASE, "4")], "Prepare")]
#[case::finished_lease_is_never_begun_again(State::Flannel, Some(3), &[(keys::LEASE, "3")], "Wait")]
#[case::older_lease(State::Flannel, Some(3), &[(keys::LEASE, "2")], "Wait")]
#[case::unreadable_lease_grants_nothing(State::Flannel, None, &[(keys::LEASE, "one")], "Wait")]
#[case::crash_while_preparing(State::Preparing, Some(3), &[(keys::LEASE, "3")], "Prepare")]
#[case::lease_taken_back_while_preparing(State::Preparing, Some(3), &[], "Withdraw")]
#[case::prepared(State::Prepared, Some(3), &[(keys::LEASE, "3"), (keys::NETWORK, "flannel")], "Wait")]
#[case::lease_taken_back(State::Prepared, Some(3), &[(keys::NETWORK, "flannel")], "Withdraw")]
#[case::lease_taken_back_after_clearing(State::Prepared, Some(3), &[(keys::NETWORK, "none")], "Withdraw")]
#[case::unreadable_lease_withdraws_nothing(State::Prepared, Some(3), &[(keys::LEASE, "?"), (keys::NETWORK, "none")], "Wait")]
#[case::newer_lease_while_prepared(State::Prepared, Some(3), &[(keys::LEASE, "4")], "Prepare")]
#[case::cleared(State::Prepared, Some(3), &[(keys::LEASE, "3"), (keys::NETWORK, "none")], "Switch")]
#[case::switching_needs_no_lease(State::Switching, Some(3), &[], "Switch")]
#[case::switched(State::Verifying, Some(3), &[(keys::LEASE, "3"), (keys::NETWORK, "none")], "Wait")]
#[case::calico_ready(State::Verifying, Some(3), &[(keys::LEASE, "3"), (keys::NETWORK, "calico")], "Verify")]
#[case::lease_lost_while_verifying(State::Verifying, Some(3), &[(keys::NETWORK, "calico")], "Verify")]
#[case::done(State::Calico, Some(3), &[(keys::LEASE, "3"), (keys::NETWORK, "calico")], "Wait")]
#[case::migrated_again(State::Calico, Some(3), &[(keys::LEASE, "4"), (keys::NETWORK, "calico")], "Answer")]
#[case::ended(State::Calico, Some(3), &[], "Finish")]
#[case::reverting(State::Reverting, Some(3), &[(keys::NETWORK, "calico")], "Wait")]
#[case::reverting_with_felix_still_there(State::Reverting, Some(3), &[(keys::NETWORK, "none"), (keys::STATE, "reverting")], "Wait")]
#[case::stuck(State::Stuck, Some(3), &[(keys::LEASE, "4")], "Wait")]
fn each_state_leads_to_its_next_step(
    #[case] state: State,
    #[case] epoch: Option<u64>,
    #[case] labels: &[(&str, &str)],
    #[case] expected: &str,
) {
    let next = decide(&entry(state, epoch), &observed(labels, "migrate", 1, Felix::Ready, false));
    assert_eq!(name(&next), expected, "{next:?}");
}

#[test]
fn while_flanneld_runs_nothing_is_switched() {
    let labels = [(keys::LEASE, "3"), (keys::NETWORK, "none")];
    let next = decide(&entry(State::Prepared, Some(3)), &observed(&labels, "migrate", 1, Felix::Gone, true));
    assert_eq!(next, Next::Wait("waiting for flanneld to end"));
}

#[test]
fn a_fence_lower_than_one_seen_grants_nothing() {
    let mut entry = entry(State::Flannel, Some(3));
    entry.fence = 2;
    let next = decide(&entry, &observed(&[(keys::LEASE, "4")], "migrate", 1, Felix::Gone, false));
    assert_eq!(name(&next), "Wait");
}

#[test]
fn a_node_that_outstays_its_budget_goes_back_and_says_what_was_missing() {
    let mut entry = entry(State::Verifying, Some(3));
    entry.message = "pod x is silent".into();
    let labels = [(keys::LEASE, "3"), (keys::NETWORK, "calico")];
    let next = decide(&entry, &observed(&labels, "migrate", 61, Felix::Ready, false));
    assert_eq!(next, Next::Revert("BudgetExceeded", "pod x is silent".into()));
}

#[test]
fn the_way_back_begins_once_calico_is_gone() {
    let labels = [(keys::LEASE, "3"), (keys::NETWORK, "none"), (keys::STATE, "reverting")];
    let next =
        decide(&entry(State::Reverting, Some(3)), &observed(&labels, "migrate", 1, Felix::Gone, false));
    assert_eq!(next, Next::Undo);
    // Calico may be on its way: the coordinator doesn't know yet that the node goes back.
    let labels = [(keys::LEASE, "3"), (keys::NETWORK, "none"), (keys::STATE, "verifying")];
    let next =
        decide(&entry(State::Reverting, Some(3)), &observed(&labels, "migrate", 1, Felix::Gone, false));
    assert_eq!(name(&next), "Wait");
}

#[test]
fn a_node_on_calico_goes_back_by_request() {
    let labels = [(keys::LEASE, "4"), (keys::NETWORK, "calico")];
    let next = decide(&entry(State::Calico, Some(3)), &observed(&labels, "rollback", 1, Felix::Ready, false));
    assert_eq!(name(&next), "RollBack");
}

#[test]
fn a_flannel_that_is_put_back_is_swept_away_once_its_pod_is_gone() {
    let labels = [(keys::LEASE, "3"), (keys::NETWORK, "calico")];
    let mut seen = observed(&labels, "migrate", 1, Felix::Ready, true);
    seen.flannel_files = true;
    assert_eq!(name(&decide(&entry(State::Calico, Some(3)), &seen)), "Wait");
    seen.flanneld = false;
    assert_eq!(decide(&entry(State::Calico, Some(3)), &seen), Next::Sweep);
}

#[test]
fn a_node_keeps_its_bridges_address_while_it_is_used_and_not_for_ever() {
    let mut entry = entry(State::Calico, Some(3));
    entry.since = Timestamp::UNIX_EPOCH;
    entry.kept = vec!["10.244.1.1".parse().unwrap()];
    entry.grant.as_mut().unwrap().keep_seconds = 60;
    let mut seen = observed(&[(keys::NETWORK, "calico")], "migrate", 59, Felix::Ready, false);
    assert_eq!(decide(&entry, &seen), Next::LetGo, "unused");
    seen.kept_in_use = true;
    assert_eq!(name(&decide(&entry, &seen)), "Wait", "used");
    seen.now = Timestamp::from_second(61).unwrap();
    assert_eq!(decide(&entry, &seen), Next::LetGo, "too long");
    entry.kept.clear();
    assert_eq!(decide(&entry, &seen), Next::Wait("done"));
}

#[test]
fn a_node_that_never_had_flannel_is_calicos_once_felix_is_ready() {
    let entry = entry(State::Flannel, None);
    let mut seen = observed(&[(keys::NETWORK, "calico")], "migrate", 1, Felix::Ready, false);
    assert_eq!(name(&decide(&entry, &seen)), "Wait", "flannel is here");
    seen.flannel_here = false;
    assert_eq!(decide(&entry, &seen), Next::Join);
    seen.felix = Felix::There;
    assert_eq!(name(&decide(&entry, &seen)), "Wait");
}
