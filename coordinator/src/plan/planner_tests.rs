//! What looks at what has changed decides as what looks at everything does.

use super::*;

/// What happens between two looks.
#[derive(Clone, Debug)]
enum Event {
    /// A node is there, changed or not.
    Node(usize, Arc<NodeFacts>),
    Gone(usize),
    /// All nodes are told again, without those that went unnoticed.
    Relist(usize),
    Request(Option<Request>),
    /// Both clocks go on.
    Later(u64),
    /// The wall clock is put right.
    Jump(i64),
    /// One of the steps under way ends.
    Ended(usize),
}

fn any_event() -> impl proptest::strategy::Strategy<Value = Event> {
    let request = proptest::sample::select(vec![
        None,
        Some(Request::Pause),
        Some(Request::Abort),
        Some(Request::Rollback),
    ]);
    let own = proptest::sample::select(vec![None, Some(Request::Rollback), Some(Request::Abort)]);
    let node = (0..6usize, any_node(), any::<bool>(), own, 0..40i64).prop_map(
        |(i, mut node, labelled, own, retry)| {
            if !labelled {
                node.view.network = Field::Absent;
            }
            if let Some(own) = own {
                node.view.request = Field::Present(own);
            }
            if let Field::Present(failures) = &mut node.view.failures {
                failures.retry_after = now() + jiff::SignedDuration::from_secs(retry);
            }
            Event::Node(i, Arc::new(node))
        },
    );
    prop_oneof![
        8 => node,
        1 => (0..6usize).prop_map(Event::Gone),
        1 => (0..6usize).prop_map(Event::Relist),
        1 => request.prop_map(Event::Request),
        2 => (0..400u64).prop_map(Event::Later),
        1 => (-30..30i64).prop_map(Event::Jump),
        4 => (0..6usize).prop_map(Event::Ended),
    ]
}

proptest! {
    #[test]
    fn a_plan_kept_up_to_date_is_the_plan_made_afresh(events in proptest::collection::vec(any_event(), 1..60), max in 1usize..4) {
        let mut policy = policy("1");
        policy.max_unavailable = MaxUnavailable::Nodes(max);
        let mut planner = Planner::new(&policy, Some("n3"));
        let mut there: BTreeMap<String, Arc<NodeFacts>> = BTreeMap::new();
        let (mut request, mut at) = (None, Moment { wall: now(), own: Duration::ZERO });
        for event in events {
            match event {
                Event::Node(i, mut node) => {
                    Arc::make_mut(&mut node).name = format!("n{i}");
                    there.insert(node.name.clone(), Arc::clone(&node));
                    planner.see(node.name.clone(), Some(node));
                }
                Event::Gone(i) => {
                    there.remove(&format!("n{i}"));
                    planner.see(format!("n{i}"), None);
                }
                Event::Relist(i) => {
                    there.remove(&format!("n{i}"));
                    planner.see_all(&there.values().cloned().collect::<Vec<_>>());
                }
                Event::Request(asked) => request = asked,
                Event::Later(seconds) => {
                    at.own += Duration::from_secs(seconds);
                    at.wall += Duration::from_secs(seconds);
                }
                Event::Jump(seconds) => at.wall += jiff::SignedDuration::from_secs(seconds),
                Event::Ended(i) => {
                    if let Some(name) = planner.busy().keys().nth(i).cloned() {
                        planner.ended(&name);
                    }
                }
            }
            planner.look(request, at);
            let leased_for = there.keys().filter_map(|name| Some((name.clone(), planner.leased_for(name, at.own)?)));
            let (nodes, leased_for) = (there.values().cloned().collect::<Vec<_>>(), leased_for.collect());
            let busy = planner.busy().clone();
            let known = Known { nodes: &nodes, own: Some("n3"), leased_for: &leased_for, busy: &busy, request };
            let mut plan = plan(&known, &policy, at.wall);
            prop_assert_eq!((planner.total(), planner.done(), planner.request()), (nodes.len(), plan.done, request));
            prop_assert_eq!(&planner.alarms(), &plan.alarms);
            prop_assert_eq!(planner.until(), plan.waiting.iter().filter_map(|waiting| waiting.until).min());
            prop_assert_eq!(planner.end(), plan.end().filter(|_| busy.is_empty()));
            let for_others = ["HeldByAlarm", "TooManyFailures", "NoFreeSlot", "OneControlPlaneAtATime"];
            plan.waiting.retain(|waiting| !for_others.contains(&waiting.reason));
            prop_assert_eq!(planner.waiting().collect::<Vec<_>>(), plan.waiting);
            plan.actions.retain(|action| !busy.contains_key(&action.node));
            prop_assert_eq!(planner.start(), plan.actions);
        }
    }
}

#[test]
fn a_step_under_way_is_not_started_again_until_it_has_ended() {
    let mut planner = Planner::new(&policy("1"), None);
    let at = Moment { wall: now(), own: Duration::ZERO };
    planner.see_all(&shared(&[flannel("a"), flannel("b")]));
    planner.look(None, at);
    let started = planner.start();
    assert_eq!(started.iter().map(|action| action.node.as_str()).collect::<Vec<_>>(), ["a"]);
    planner.look(None, at);
    assert_eq!(planner.start(), [], "its slot is used while its lease is written");
    planner.ended("a");
    planner.look(None, at);
    assert_eq!(planner.start(), started, "it came to nothing, and is decided anew");
}

#[test]
fn who_waits_for_a_person_doesnt_keep_those_behind_from_starting() {
    let mut planner = Planner::new(&policy("2"), None);
    let stuck = leased("a", State::Stuck, Network::None, Goal::Migrate);
    planner.see_all(&shared(&[stuck, flannel("b"), resting("c", State::Calico, Network::Calico)]));
    planner.look(Some(Request::Rollback), Moment { wall: now(), own: Duration::ZERO });
    let started = planner.start();
    assert!(
        matches!(started[..], [Action { step: Step::Grant { goal: Goal::Rollback, .. }, .. }]),
        "{started:?}"
    );
    // Nodes that failed come after fresh ones, which are held by failures elsewhere.
    let mut planner = Planner::new(&policy("3"), None);
    let past = "2025-12-31T00:00:00Z";
    planner.see_all(&shared(&[
        failed(flannel("a"), true, past),
        failed(flannel("b"), true, past),
        flannel("c"),
    ]));
    planner.look(None, Moment { wall: now(), own: Duration::ZERO });
    assert_eq!(planner.start().iter().map(|action| action.node.as_str()).collect::<Vec<_>>(), ["a", "b"]);
}

#[test]
fn a_lease_is_overdue_by_time_alone_and_only_for_as_long_as_it_is_that_lease() {
    let mut planner = Planner::new(&policy("2"), None);
    let at = |seconds| Moment { wall: now(), own: Duration::from_secs(seconds) };
    let node = leased("a", State::Switching, Network::None, Goal::Migrate);
    planner.see("a".into(), Some(Arc::new(node.clone())));
    planner.look(None, at(0));
    let limit = judge::lease_limit(&policy("2")).as_secs();
    planner.look(None, at(limit));
    assert_eq!((planner.alarms(), planner.waiting().count()), (vec![], 1));
    planner.look(None, at(limit + 1));
    assert_eq!(planner.alarms()[0].reason, "LeaseOverdue");
    let mut next = node;
    next.view.lease = Field::Present(Epoch::new(5).unwrap());
    next.view.grant = Field::Present(grant_of(5, Goal::Migrate));
    planner.see("a".into(), Some(Arc::new(next)));
    planner.look(None, at(limit + 2));
    assert_eq!((planner.alarms(), planner.waiting().count()), (vec![], 1));
}
