use flannel_migration_protocol::{Failures, Field, Grant, Report, State};
use proptest::prelude::{Just, Strategy as _, any, prop_assert, prop_assert_eq, prop_oneof, proptest};
use rstest::rstest;

use self::grants::grant;
use super::*;
use crate::args::MaxUnavailable;

#[path = "../../tests/model/grant.rs"]
mod grants;
#[path = "planner_tests.rs"]
mod planner;
#[path = "requests_tests.rs"]
mod requests;

fn policy(max_unavailable: &str) -> Policy {
    Policy {
        strategy: Strategy::Drain,
        max_unavailable: max_unavailable.parse().unwrap(),
        drain_timeout: Duration::from_mins(5),
        max_failures: 2,
        node_budget: Duration::from_mins(2),
        keep_connections: Duration::from_mins(10),
        image_timeout: Duration::from_mins(10),
        preflight_timeout: Duration::from_mins(10),
    }
}

fn now() -> Timestamp {
    "2026-01-01T00:00:00Z".parse().unwrap()
}

fn grant_of(epoch: u64, goal: Goal) -> Grant {
    grant(Epoch::new(epoch).unwrap(), goal)
}

fn resting(name: &str, state: State, network: Network) -> NodeFacts {
    let view =
        NodeView { state: Field::Present(state), network: Field::Present(network), ..NodeView::default() };
    NodeFacts { name: name.into(), ready: true, linux: true, view, ..NodeFacts::default() }
}

fn flannel(name: &str) -> NodeFacts {
    resting(name, State::Flannel, Network::Flannel)
}

fn report(state: State, epoch: u64) -> Report {
    Report {
        epoch: Epoch::new(epoch),
        state,
        step: String::new(),
        since: now(),
        reason: "R".into(),
        message: "what a person must do".into(),
        evict: vec![],
        host: None,
    }
}

fn leased(name: &str, state: State, network: Network, goal: Goal) -> NodeFacts {
    let mut node = resting(name, state, network);
    node.view.lease = Field::Present(Epoch::new(4).unwrap());
    node.view.grant = Field::Present(grant_of(4, goal));
    node.view.report = Field::Present(report(state, 4));
    node
}

fn failed(mut node: NodeFacts, touched: bool, retry_after: &str) -> NodeFacts {
    node.view.failures = Field::Present(Failures {
        count: 1,
        last_epoch: Epoch::new(7).unwrap(),
        retry_after: retry_after.parse().unwrap(),
        touched,
        reason: String::new(),
        message: String::new(),
    });
    node
}

fn shared(nodes: &[NodeFacts]) -> Vec<Arc<NodeFacts>> {
    nodes.iter().cloned().map(Arc::new).collect()
}

fn decide(nodes: &[NodeFacts], policy: &Policy) -> Plan {
    plan(
        &Known {
            nodes: &shared(nodes),
            own: Some("own"),
            leased_for: &BTreeMap::new(),
            busy: &BTreeMap::new(),
            request: None,
        },
        policy,
        now(),
    )
}

fn granted(plan: &Plan) -> Vec<&str> {
    plan.actions
        .iter()
        .filter(|action| matches!(action.step, Step::Grant { .. }))
        .map(|action| action.node.as_str())
        .collect()
}

fn reasons(plan: &Plan) -> Vec<&'static str> {
    plan.waiting.iter().map(|waiting| waiting.reason).collect()
}

#[test]
fn a_lease_that_is_just_being_written_uses_its_slot_and_other_steps_use_none() {
    let nodes = shared(&[flannel("a"), flannel("b")]);
    let grant = Step::Grant { epoch: Epoch::FIRST, goal: Goal::Migrate, strategy: Strategy::Drain };
    for (step, goes) in [(grant, None), (Step::Enrol, Some("b"))] {
        let busy = BTreeMap::from([("a".to_owned(), step)]);
        let known =
            Known { nodes: &nodes, own: None, leased_for: &BTreeMap::new(), busy: &busy, request: None };
        let plan = plan(&known, &policy("1"), now());
        assert_eq!(granted(&plan), Vec::from_iter(goes), "{plan:?}");
        assert_eq!(reasons(&plan).len(), usize::from(goes.is_none()), "{plan:?}");
    }
}

#[rstest]
#[case(State::Prepared, Network::Flannel, Goal::Migrate, Step::Clear)]
#[case(State::Verifying, Network::None, Goal::Migrate, Step::Register)]
#[case(State::Reverting, Network::Calico, Goal::Migrate, Step::Retreat)]
#[case(State::Reverting, Network::Flannel, Goal::Migrate, Step::Retreat)]
#[case(State::Reverting, Network::Calico, Goal::Rollback, Step::Retreat)]
#[case(State::Flannel, Network::Flannel, Goal::Migrate, Step::GiveBack)]
#[case(State::Flannel, Network::None, Goal::Migrate, Step::GiveBack)]
#[case(State::Flannel, Network::None, Goal::Rollback, Step::GiveBack)]
#[case(State::Calico, Network::Calico, Goal::Migrate, Step::Settle)]
fn an_answer_leads_to_its_step(
    #[case] state: State,
    #[case] network: Network,
    #[case] goal: Goal,
    #[case] step: Step,
) {
    let plan = decide(&[leased("a", state, network, goal)], &policy("1"));
    assert_eq!(plan.actions, [Action { node: "a".into(), step }]);
}

#[rstest]
#[case(State::Preparing, Network::Flannel, Goal::Migrate)]
#[case(State::Prepared, Network::None, Goal::Migrate)]
#[case(State::Switching, Network::None, Goal::Migrate)]
#[case(State::Verifying, Network::Calico, Goal::Migrate)]
#[case(State::Reverting, Network::None, Goal::Migrate)]
#[case(State::Calico, Network::Calico, Goal::Rollback)]
fn while_it_is_the_agents_turn_nothing_is_done(
    #[case] state: State,
    #[case] network: Network,
    #[case] goal: Goal,
) {
    let node = leased("a", state, network, goal);
    let plan = decide(std::slice::from_ref(&node), &policy("1"));
    assert!(plan.actions.is_empty() && plan.alarms.is_empty() && plan.waiting.len() == 1, "{plan:?}");
    let long = BTreeMap::from([("a".to_owned(), Duration::from_secs(100_000))]);
    let overdue = super::plan(
        &Known {
            nodes: &shared(&[node, flannel("b")]),
            own: None,
            leased_for: &long,
            busy: &BTreeMap::new(),
            request: None,
        },
        &policy("2"),
        now(),
    );
    assert_eq!(overdue.alarms[0].reason, "LeaseOverdue");
    assert!(overdue.actions.is_empty(), "an overdue lease is an alarm and starts nothing else");
}

#[test]
fn an_answer_about_an_earlier_lease_is_none() {
    let mut node = leased("a", State::Flannel, Network::Flannel, Goal::Migrate);
    node.view.report = Field::Present(report(State::Flannel, 3));
    assert_eq!(reasons(&decide(&[node], &policy("1"))), ["AgentToAnswer"]);
}

#[test]
fn workers_come_first_and_the_own_node_last() {
    let mut control_plane = flannel("a-control-plane");
    control_plane.control_plane = true;
    let mut own = flannel("own");
    own.control_plane = false;
    let nodes = [control_plane, own, flannel("z"), flannel("b")];
    assert_eq!(granted(&decide(&nodes, &policy("1"))), ["b"]);
    assert_eq!(granted(&decide(&nodes, &policy("100%"))), ["b", "z", "a-control-plane", "own"]);
}

#[test]
fn control_planes_go_one_at_a_time() {
    let mut nodes = vec![flannel("a"), flannel("b")];
    for node in &mut nodes {
        node.control_plane = true;
    }
    let plan = decide(&nodes, &policy("2"));
    assert_eq!((granted(&plan), reasons(&plan)), (vec!["a"], vec!["OneControlPlaneAtATime"]));
}

#[test]
fn nodes_that_are_not_ready_use_a_slot_and_are_not_started() {
    let mut down = flannel("a");
    down.ready = false;
    let plan = decide(&[down.clone(), flannel("b")], &policy("1"));
    assert!(granted(&plan).is_empty());
    assert_eq!(reasons(&plan), ["NodeNotReady", "NoFreeSlot"]);
    // One that is in change as well counts once.
    let mut both = leased("a", State::Switching, Network::None, Goal::Migrate);
    both.ready = false;
    assert_eq!(granted(&decide(&[both, flannel("b")], &policy("2"))), ["b"]);
}

#[test]
fn paused_nodes_are_not_started_but_finish_what_they_began() {
    let mut paused = flannel("a");
    paused.view.paused = true;
    let mut prepared = leased("b", State::Prepared, Network::Flannel, Goal::Migrate);
    prepared.view.paused = true;
    let plan = decide(&[paused, prepared], &policy("3"));
    assert_eq!(plan.actions, [Action { node: "b".into(), step: Step::Clear }]);
    assert_eq!(reasons(&plan), ["Paused"]);
}

#[test]
fn a_failed_node_is_tried_again_later_and_after_the_others() {
    let waiting = failed(flannel("a"), false, "2026-01-01T00:00:10Z");
    let plan = decide(&[waiting, flannel("b")], &policy("1"));
    assert_eq!(granted(&plan), ["b"]);
    assert_eq!(plan.waiting[0].until, "2026-01-01T00:00:10Z".parse().ok());
    let due = failed(flannel("a"), false, "2025-12-31T00:00:00Z");
    assert_eq!(granted(&decide(&[due.clone(), flannel("b")], &policy("1"))), ["b"]);
    let by_a_wrong_clock = failed(flannel("a"), false, "2026-01-01T01:00:00Z");
    assert_eq!(granted(&decide(&[by_a_wrong_clock], &policy("1"))), ["a"]);
    let plan = decide(&[due], &policy("1"));
    assert!(matches!(plan.actions[0].step, Step::Grant { epoch, .. } if epoch.get() == 8), "{plan:?}");
}

#[test]
fn too_many_nodes_that_failed_after_a_change_stop_fresh_ones_only() {
    let past = "2025-12-31T00:00:00Z";
    let nodes = [failed(flannel("a"), true, past), failed(flannel("b"), true, past), flannel("c")];
    let plan = decide(&nodes, &policy("3"));
    assert_eq!(granted(&plan), ["a", "b"]);
    assert_eq!(reasons(&plan), ["TooManyFailures"]);
    let nodes = [failed(flannel("a"), false, past), failed(flannel("b"), false, past), flannel("c")];
    assert_eq!(granted(&decide(&nodes, &policy("3"))), ["c", "a", "b"]);
}

#[test]
fn a_stuck_node_keeps_its_slot_and_stops_new_leases() {
    let stuck = leased("a", State::Stuck, Network::None, Goal::Migrate);
    let plan = decide(&[stuck, flannel("b")], &policy("5"));
    assert!(granted(&plan).is_empty());
    assert_eq!(plan.alarms[0].message, "what a person must do");
}

#[test]
fn an_annotation_overrides_the_strategy_for_its_node() {
    let mut node = flannel("a");
    node.view.strategy = Field::Present(Strategy::InPlace);
    let plan = decide(&[node], &policy("1"));
    assert!(matches!(plan.actions[0].step, Step::Grant { strategy: Strategy::InPlace, .. }));
}

#[test]
fn all_done_is_complete_and_a_silent_agent_is_not() {
    let done = resting("a", State::Calico, Network::Calico);
    let plan = decide(std::slice::from_ref(&done), &policy("1"));
    assert!(plan.end() == Some(End::Migrated) && plan.done == 1);
    let mut silent = flannel("b");
    silent.view.state = Field::Absent;
    let plan = decide(&[done, silent], &policy("1"));
    assert_eq!(plan.end(), None);
    assert_eq!(reasons(&plan), ["AgentSilent"]);
}

#[test]
fn a_node_without_network_label_is_enrolled_and_a_wrong_label_corrected() {
    let joined = NodeFacts { name: "a".into(), ready: true, ..NodeFacts::default() };
    let mislabelled = resting("b", State::Calico, Network::Flannel);
    let left = resting("c", State::Flannel, Network::None);
    let steps: Vec<_> = decide(&[joined, mislabelled, left], &policy("1"))
        .actions
        .into_iter()
        .map(|action| action.step)
        .collect();
    assert_eq!(steps, [Step::Enrol, Step::Relabel(Network::Calico), Step::Relabel(Network::Flannel)]);
}

#[test]
fn back_off_doubles_up_to_five_minutes() {
    let seconds: Vec<_> =
        [1, 2, 3, 6, 7, u32::MAX].into_iter().map(|count| back_off(count).as_secs()).collect();
    assert_eq!(seconds, [10, 20, 40, 300, 300, 300]);
}

fn any_node() -> impl proptest::strategy::Strategy<Value = NodeFacts> {
    let network = prop_oneof![Just(Network::Flannel), Just(Network::None), Just(Network::Calico)];
    let state = proptest::sample::select(State::ALL.to_vec());
    (state, network, 0..5u8, any::<bool>(), any::<bool>(), any::<bool>()).prop_map(
        |(state, network, kind, ready, control_plane, touched)| {
            let mut node = match kind {
                0 => resting("", state, network),
                1 => failed(flannel(""), touched, "2025-01-01T00:00:00Z"),
                2 => flannel(""),
                _ => leased("", state, network, Goal::Migrate),
            };
            node.ready = ready;
            node.control_plane = control_plane;
            node
        },
    )
}

proptest! {
    #[test]
    fn never_more_nodes_are_unavailable_than_allowed(nodes in proptest::collection::vec(any_node(), 1..12), max in 1usize..5) {
        let mut nodes = nodes;
        for (i, node) in nodes.iter_mut().enumerate() {
            node.name = format!("n{i}");
        }
        let mut policy = policy("1");
        policy.max_unavailable = MaxUnavailable::Nodes(max);
        let plan = decide(&nodes, &policy);
        let before = nodes.iter().filter(|node| unavailable(node)).count();
        let grants = granted(&plan);
        prop_assert!(grants.is_empty() || before + grants.len() <= max);
        for name in grants {
            let node = nodes.iter().find(|node| node.name == name).unwrap();
            prop_assert!(node.ready && !node.view.slot_used());
        }
        // Every node is accounted for exactly once.
        prop_assert_eq!(plan.actions.len() + plan.waiting.len() + plan.alarms.len() + plan.done + plan.back, nodes.len());
    }
}
