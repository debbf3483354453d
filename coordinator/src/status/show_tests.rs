use clap::Parser as _;
use flannel_migration_protocol::{Field, Network};
use k8s_openapi::api::coordination::v1::LeaseSpec;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff;

use super::*;
use crate::args::Cli;
use crate::status::PolicyStatus;

fn lease(holder: &str) -> Lease {
    let spec = LeaseSpec {
        holder_identity: Some(holder.to_owned()),
        renew_time: Some(MicroTime(jiff::Timestamp::from_microsecond(1_500_000).unwrap())),
        ..LeaseSpec::default()
    };
    Lease { spec: Some(spec), ..Lease::default() }
}

#[test]
fn without_a_status_the_nodes_tell_the_phase() {
    let untouched = NodeFacts::default();
    let mut labelled = NodeFacts::default();
    labelled.view.network = Field::Present(Network::Flannel);
    let migrated = NodeFacts { migrated: true, ..NodeFacts::default() };
    for (node, phase) in
        [(untouched, Phase::NotStarted), (labelled, Phase::Roll), (migrated, Phase::Complete)]
    {
        assert_eq!(noted(None, None, &[node.into()]).phase, phase);
    }
}

#[test]
fn who_leads_is_the_leases_holder_and_its_version_is_known_only_of_itself() {
    let kept = Status {
        phase: Phase::Roll,
        coordinator: Some(Coordinator { identity: "a".into(), version: "1".into(), renewed: None }),
        ..Status::default()
    };
    assert_eq!(noted(Some(&kept), None, &[]).coordinator, None);
    assert_eq!(noted(Some(&kept), Some(lease("")), &[]).coordinator, None);
    let known = noted(Some(&kept), Some(lease("a")), &[]).coordinator.unwrap();
    assert_eq!((known.version.as_str(), known.renewed), ("1", Timestamp::from_microsecond(1_500_000).ok()));
    assert_eq!(noted(Some(&kept), Some(lease("b")), &[]).coordinator.unwrap().version, "");
}

#[test]
fn what_waits_is_told_by_the_coordinators_policy_and_not_ones_own() {
    let own = Cli::try_parse_from(["coordinator"]).unwrap().options.policy;
    let said = PolicyStatus {
        strategy: "in-place".into(),
        max_unavailable: "50%".into(),
        max_failures: 7,
        drain_timeout_seconds: 1,
        node_budget_seconds: 2,
    };
    let noted = Noted { policy: Some(said.clone()), ..Noted::default() };
    assert_eq!(PolicyStatus::from(&policy(&own, &noted)), said);
    assert_eq!(policy(&own, &Noted::default()), own);
}
