//! What an administrator asks for.

use super::*;

fn by_request(nodes: &[NodeFacts], request: Request) -> Plan {
    let known = Known {
        nodes: &shared(nodes),
        own: None,
        leased_for: &BTreeMap::new(),
        busy: &BTreeMap::new(),
        request: Some(request),
    };
    plan(&known, &policy("1"), now())
}

#[test]
fn a_paused_cluster_ends_what_it_began_and_neither_starts_nor_finishes() {
    let nodes = [flannel("a"), leased("b", State::Prepared, Network::Flannel, Goal::Migrate)];
    let plan = by_request(&nodes, Request::Pause);
    assert_eq!(plan.actions, [Action { node: "b".into(), step: Step::Clear }]);
    assert_eq!(reasons(&plan), ["Paused"]);
    let done = [resting("a", State::Calico, Network::Calico)];
    assert_eq!(by_request(&done, Request::Pause).end(), None);
}

#[rstest]
#[case(State::Preparing, Network::Flannel, true)]
#[case(State::Prepared, Network::Flannel, true)]
#[case::its_agent_may_have_begun(State::Prepared, Network::None, false)]
#[case(State::Switching, Network::None, false)]
#[case(State::Verifying, Network::Calico, false)]
fn an_abort_calls_off_what_has_changed_nothing_and_lets_the_rest_go_on(
    #[case] state: State,
    #[case] network: Network,
    #[case] called_off: bool,
) {
    for request in [Request::Abort, Request::Rollback] {
        let nodes = [leased("a", state, network, Goal::Migrate), flannel("b")];
        let plan = by_request(&nodes, request);
        assert_eq!(plan.actions.iter().any(|action| action.step == Step::CallOff), called_off, "{plan:?}");
        assert!(granted(&plan).is_empty());
        assert_eq!(plan.end(), None);
    }
}

#[test]
fn an_aborted_cluster_is_one_at_rest_whatever_its_networks() {
    let nodes = [flannel("a"), resting("b", State::Calico, Network::Calico)];
    assert_eq!(by_request(&nodes, Request::Abort).end(), Some(End::Aborted));
    let stuck = [flannel("a"), leased("b", State::Stuck, Network::None, Goal::Migrate)];
    assert_eq!(by_request(&stuck, Request::Abort).end(), None);
}

#[test]
fn a_rollback_grants_leases_back_until_no_node_is_calicos() {
    let nodes = [
        flannel("a"),
        resting("b", State::Calico, Network::Calico),
        resting("c", State::Calico, Network::Calico),
    ];
    let plan = by_request(&nodes, Request::Rollback);
    let step = Step::Grant { epoch: Epoch::FIRST, goal: Goal::Rollback, strategy: Strategy::Drain };
    assert_eq!(plan.actions, [Action { node: "b".into(), step }]);
    assert_eq!((plan.back, reasons(&plan)), (1, vec!["NoFreeSlot"]));
    assert_eq!(by_request(&[flannel("a")], Request::Rollback).end(), Some(End::RolledBack));
    // What was taken back already needs no label any more.
    let bare = NodeFacts { name: "d".into(), ready: true, ..NodeFacts::default() };
    assert_eq!(by_request(&[bare], Request::Rollback).end(), Some(End::RolledBack));
}

#[test]
fn what_is_asked_of_a_node_comes_before_what_is_asked_of_the_cluster() {
    let mut back = resting("a", State::Calico, Network::Calico);
    back.view.request = Field::Present(Request::Rollback);
    assert_eq!(granted(&by_request(std::slice::from_ref(&back), Request::Pause)), ["a"]);
    assert_eq!(granted(&decide(&[back], &policy("1"))), ["a"]);
    let mut gone_back = flannel("a");
    gone_back.view.request = Field::Present(Request::Rollback);
    let plan = decide(&[gone_back], &policy("1"));
    assert_eq!((granted(&plan), reasons(&plan)), (vec![], vec!["RolledBack"]));
    let mut stays = resting("a", State::Calico, Network::Calico);
    stays.view.paused = true;
    assert_eq!(reasons(&by_request(&[stays], Request::Rollback)), ["Paused"]);
}

#[test]
fn trouble_elsewhere_stops_migrations_and_not_rollbacks() {
    let stuck = leased("a", State::Stuck, Network::None, Goal::Migrate);
    let nodes = shared(&[stuck, flannel("b"), resting("c", State::Calico, Network::Calico)]);
    let known = Known {
        nodes: &nodes,
        own: None,
        leased_for: &BTreeMap::new(),
        busy: &BTreeMap::new(),
        request: Some(Request::Rollback),
    };
    assert_eq!(granted(&plan(&known, &policy("2"), now())), ["c"]);
}
