//! The switch on real devices: nothing is lost, and what is undone is as it was.

#![allow(clippy::unwrap_used, reason = "all of it is tests")]

mod world;

use std::net::Ipv4Addr;
use std::path::Path;
use std::time::{Duration, Instant};

use flannel_migration_agent::echo::Echo;
use flannel_migration_agent::host::{connections, netns};
use flannel_migration_agent::journal::Journal;
use flannel_migration_agent::steps::{Op, apply, bridge, detour, undo};
use world::{World, sh};

#[test]
fn pods_change_over_and_back_while_they_talk() {
    let world = World::new(5);
    let before = world.snapshot();
    let mut journal = world.captured(true);
    let site = world.site(true);
    let probers = world.probe(Duration::from_millis(5), 5);
    world.switch(&mut journal, &site);
    let node = world.node();
    let links = sh(&format!("ip -n {node} -o link"));
    assert!(
        !links.contains("cni0") && !links.contains("flannel.1") && links.contains("vxlan.calico"),
        "{links}"
    );
    let routes = sh(&format!("ip -n {node} route"));
    for pod in &world.pods {
        let cali = flannel_migration_agent::inventory::interface_name("default", &pod.name);
        assert!(routes.contains(&format!("{} dev {cali} scope link", pod.address)), "{routes}");
        assert_eq!(
            sh(&format!("ip -n {} route", pod.netns)).lines().map(str::trim).collect::<Vec<_>>(),
            ["default via 169.254.1.1 dev eth0", "169.254.1.1 dev eth0 scope link"]
        );
    }
    probers.none_lost("there");

    let probers = world.probe(Duration::from_millis(5), 5);
    let started = Instant::now();
    world.inside(|| undo(&mut journal, &site).unwrap());
    println!("undo of {} pods: {:?}", world.pods.len(), started.elapsed());
    probers.none_lost("back");
    world.assert_same(&before, "after the undo");
}

#[test]
fn what_the_node_itself_talks_about_with_its_pods_goes_on_until_it_ends() {
    let world = World::new(2);
    let before = world.snapshot();
    let mut connection = world.connect(&world.pods[0], world.pods[0].address.into());
    assert_eq!(connection.source(), "10.244.1.1", "the kernel takes the bridge's address");
    connection.talk();
    let mut journal = world.captured(true);
    let site = world.site(true);
    world.switch(&mut journal, &site);
    connection.talk();
    let kept = bridge::addresses(journal.entry.captured.as_ref().unwrap()).unwrap();
    assert_eq!(kept, ["10.244.1.1".parse::<std::net::IpAddr>().unwrap()]);
    let in_use = |kept: &[std::net::IpAddr]| world.inside(|| connections::any_from(kept));
    assert!(in_use(&kept));
    // What begins now comes from elsewhere.
    let mut later = world.connect(&world.pods[1], world.pods[1].address.into());
    later.talk();
    assert_ne!(later.source(), "10.244.1.1");

    world.inside(|| undo(&mut journal, &site).unwrap());
    connection.talk();
    world.assert_same(&before, "after the undo");

    world.switch(&mut journal, &site);
    connection.talk();
    drop(connection);
    let ended = Instant::now();
    while in_use(&kept) && ended.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(!in_use(&kept));
    world.inside(|| bridge::let_go(&kept).unwrap());
    assert!(!sh(&format!("ip -n {} address", world.node())).contains("10.244.1.1"));
}

#[test]
fn what_a_pod_sends_while_its_port_is_stopped_takes_the_detour() {
    let world = World::new(1);
    let mut journal = world.captured(true);
    let site = world.site(true);
    let before = Op::SWITCH.into_iter().take_while(|op| *op != Op::MovePods);
    world.inside(|| before.for_each(|op| apply(&mut journal, &site, op).unwrap()));
    let captured = journal.entry.captured.as_ref().unwrap();
    let (bridge, port) = (&captured.bridge.as_ref().unwrap().link, captured.pods[0].cali.clone());
    let (node, pod) = (world.node(), &world.pods[0]);
    // As in the kernel between a port's stop and its end. What is for the pod goes straight to it.
    sh(&format!(
        "ip -n {node} route add {} dev {port}; bridge -n {node} link set dev {port} state 0",
        pod.address
    ));
    let answered = || {
        netns::run(&Path::new("/run/netns").join(&pod.netns), || {
            let mut echo = Echo::open(Ipv4Addr::new(10, 244, 2, 5).into()).unwrap();
            let sent = echo.send(84).unwrap();
            echo.wait(Duration::from_millis(500)).is_ok_and(|sequence| sequence == sent)
        })
        .unwrap()
    };
    assert!(!answered(), "what a stopped port gets is dropped");
    assert!(world.inside(|| detour::around(&[port], bridge, answered)), "there is no detour");
    assert!(!answered(), "the detour is still open");
    world.inside(|| detour::remove().unwrap());
    assert!(!sh(&format!("ip -n {node} -o link")).contains("detour"));
}

#[test]
fn a_node_that_can_have_no_detour_changes_over_and_back_all_the_same() {
    let world = World::new(2);
    let node = world.node();
    sh(&format!("ip -n {node} link add vethdetour0 type bridge"));
    let before = world.snapshot();
    let mut journal = world.captured(true);
    let site = world.site(true);
    world.switch(&mut journal, &site);
    world.inside(|| undo(&mut journal, &site).unwrap());
    world.assert_same(&before, "after the undo");
    let known = sh(&format!("ip -n {node} neigh show dev cni0"));
    for pod in &world.pods {
        // Nobody has asked for it: it was told.
        assert!(known.contains(&format!("{} lladdr", pod.address)), "{known}");
    }
}

#[test]
fn a_link_that_is_by_chance_in_the_group_of_those_that_go_stays() {
    let world = World::new(1);
    let node = world.node();
    let mut journal = world.captured(true);
    let site = world.site(true);
    sh(&format!(
        "ip -n {node} link add stays type bridge; ip -n {node} link set stays group {}",
        bridge::GROUP
    ));
    world.switch(&mut journal, &site);
    let links = sh(&format!("ip -n {node} -o link"));
    assert!(links.contains("stays") && !links.contains("cni0") && !links.contains("detour"), "{links}");
}

#[test]
fn a_kernel_that_renames_no_link_that_is_up_gets_all_back_in_the_same_call() {
    let world = World::new(3);
    let before = world.snapshot();
    let mut journal = world.captured(false);
    let site = world.site(false);
    let probers = world.probe(Duration::from_millis(10), 3);
    world.switch(&mut journal, &site);
    let node = world.node();
    // flannel's route, and beside it those to the peer's blocks as Felix wants them.
    let routes = sh(&format!("ip -n {node} route show dev vxlan.calico"));
    for network in ["10.244.2.0/24", "10.244.2.0/26", "10.244.2.64/26", "10.244.2.128/26", "10.244.2.192/26"]
    {
        assert!(routes.contains(&format!("{network} via 10.244.2.0 onlink")), "{routes}");
    }
    assert_eq!(routes.lines().count(), 5, "{routes}");
    assert!(
        sh(&format!("ip -n {node} neigh show dev vxlan.calico"))
            .contains("10.244.2.0 lladdr 0a:00:00:00:00:02 PERMANENT")
    );
    world.inside(|| undo(&mut journal, &site).unwrap());
    let (sent, lost, text) = probers.stop();
    println!("there and back with links down and up: {lost} of {sent} lost; {text}");
    // Each link is down for the time of one system call. Pods then ask anew for each other's hardware address, and repeat a
    // question that met a link that was down after a second: so much is lost at most, and then nothing any more.
    std::thread::sleep(Duration::from_millis(1500));
    world.probe(Duration::from_millis(10), 3).none_lost("afterwards");
    world.assert_same(&before, "after the undo");
}

#[test]
fn a_crash_after_any_operation_or_in_the_middle_of_it_is_undone_or_gone_on_with() {
    World::new(2).crash_everywhere();
}

#[test]
fn a_bridge_that_a_boot_took_is_made_anew() {
    let world = World::new(1);
    let journal = world.captured(true);
    let bridge = journal.entry.captured.unwrap().bridge.unwrap();
    let node = world.node();
    let look = || {
        sh(&format!(
            "ip -n {node} -o -4 address show cni0 | awk '{{print $2, $4}}'; ip -n {node} route show dev cni0"
        ))
    };
    let before = look();
    // Its index is another's.
    sh(&format!(
        "ip -n {node} link del cni0; ip -n {node} link add other index {} type bridge",
        bridge.link.index
    ));
    for _ in 0..2 {
        world.inside(|| bridge::make_anew(&bridge).unwrap());
        assert_eq!(before.lines().next(), look().lines().next());
        assert!(look().contains("src"), "{}", look());
    }
}

#[test]
fn an_undo_that_can_note_nothing_changes_nothing() {
    let world = World::new(2);
    let before = world.snapshot();
    let mut journal = world.captured(true);
    let site = world.site(true);
    world.switch(&mut journal, &site);
    let look = || {
        let (node, directory) = (world.node(), world.directory.path().display());
        sh(&format!(
            "ip -n {node} -o link; ip -n {node} route; find {directory}/net.d -type f -exec cksum {{}} +"
        ))
    };
    let switched = look();
    let (kept, away) = (world.path("journal"), world.path("away"));
    std::fs::rename(&kept, &away).unwrap();
    std::fs::write(&kept, "in the directory's place").unwrap();
    let failures = world.inside(|| undo(&mut journal, &site).unwrap_err());
    assert_eq!(failures.len(), Op::SWITCH.len(), "{failures:?}");
    assert_eq!(switched, look(), "nothing could be noted");
    std::fs::remove_file(&kept).unwrap();
    std::fs::rename(&away, &kept).unwrap();
    let mut journal = Journal::open(&kept, "n1").unwrap();
    world.inside(|| undo(&mut journal, &site).unwrap());
    world.assert_same(&before, "undone once it could be");
}

#[test]
fn nothing_of_flannels_is_left_once_calico_stands() {
    let world = World::new(1);
    let mut journal = world.captured(true);
    let site = world.site(true);
    world.inside(|| {
        Op::SWITCH.into_iter().chain(Op::CLEAN).for_each(|op| apply(&mut journal, &site, op).unwrap());
    });
    let node = world.node();
    let left = sh(&format!(
        "ip -n {node} -o link; ip netns exec {node} sh -c 'iptables-nft-save; iptables-legacy-save; nft list ruleset'; cd {}; find net.d results cni run 2>/dev/null || true",
        world.directory.path().display()
    ));
    for gone in
        ["flannel.1", "cni0", "FLANNEL", "flannel-ipv4", "flanneld", "10-flannel", "cbr0", "subnet.env"]
    {
        assert!(!left.contains(gone), "{gone} in\n{left}");
    }
    let config = std::fs::read_to_string(world.path("net.d/10-calico.conflist")).unwrap();
    assert_eq!(
        config,
        r#"{"name":"k8s-pod-network","plugins":[{"type":"calico","mtu":1450,"nodename":"n1"}]}"#
    );
}

#[test]
fn the_pods_of_a_full_node_change_over_while_they_talk() {
    let world = World::new(110);
    let mut journal = world.captured(true);
    let site = world.site(true);
    let probers = world.probe(Duration::from_millis(20), 4);
    world.switch(&mut journal, &site);
    probers.none_lost("full");
}
