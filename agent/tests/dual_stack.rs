//! The switch on real devices with IPv6 beside IPv4: nothing of either is lost, and what is undone is as it was.

#![allow(clippy::unwrap_used, reason = "all of it is tests")]

mod world;

use std::time::{Duration, Instant};

use flannel_migration_agent::journal::Journal;
use flannel_migration_agent::steps::{Op, Site, apply, undo};
use world::World;

fn switch(world: &World, journal: &mut Journal, site: &Site) {
    let started = Instant::now();
    world.inside(|| {
        for op in Op::SWITCH {
            let started = Instant::now();
            apply(journal, site, op).unwrap();
            println!("{:16} {:?}", op.as_str(), started.elapsed());
        }
    });
    println!("switch of {} pods: {:?}", world.pods.len(), started.elapsed());
}

#[test]
fn pods_of_both_families_change_over_and_back_while_they_talk() {
    let world = World::dual(5);
    let before = world.snapshot();
    let mut journal = world.captured(true);
    let site = world.site(true);
    let probers = world.probe(Duration::from_millis(5), 5);
    switch(&world, &mut journal, &site);
    let (sent, lost, text) = probers.stop();
    println!("there: {lost} of {sent} lost; {text}");
    assert_eq!(lost, 0, "{lost} of {sent} lost: {text}");

    let probers = world.probe(Duration::from_millis(5), 5);
    let started = Instant::now();
    world.inside(|| undo(&mut journal, &site).unwrap());
    println!("undo of {} pods: {:?}", world.pods.len(), started.elapsed());
    let (sent, lost, text) = probers.stop();
    println!("back: {lost} of {sent} lost; {text}");
    assert_eq!(lost, 0, "{lost} of {sent} lost: {text}");
    world.assert_same(&before, "after the undo");
}

#[test]
fn the_pods_of_a_full_node_change_over_while_they_talk() {
    let world = World::dual(110);
    let mut journal = world.captured(true);
    let site = world.site(true);
    let probers = world.probe(Duration::from_millis(20), 4);
    switch(&world, &mut journal, &site);
    let (sent, lost, text) = probers.stop();
    println!("{lost} of {sent} lost; {text}");
    assert_eq!(lost, 0, "{lost} of {sent} lost: {text}");
}
