//! Probers: echoes on every way between the pods, their node, the peer and the outside.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use flannel_migration_agent::echo::Echo;
use flannel_migration_agent::host::netns;

use super::{World, six};

impl World {
    /// Starts probers: every pod to every pod, node to pods, pods to the peer's pod and back.
    pub fn probe(&self, interval: Duration, pairs: usize) -> Probers {
        let mut flows: Vec<(String, String, IpAddr)> = Vec::new();
        let mut remote: Vec<IpAddr> = vec![Ipv4Addr::new(10, 244, 2, 5).into()];
        let mut outside: Vec<IpAddr> = vec![Ipv4Addr::new(192, 0, 2, 2).into()];
        if self.dual {
            remote.extend(six::REMOTE.map(IpAddr::V6));
            outside.push(six::OUTSIDE.into());
        }
        for from in self.pods.iter().take(pairs) {
            for to in self.pods.iter().rev().take(pairs).filter(|to| to.address != from.address) {
                for address in to.addresses() {
                    flows.push((
                        format!("{} -> {} {address}", from.name, to.name),
                        from.netns.clone(),
                        address,
                    ));
                }
            }
            for address in &remote {
                flows.push((format!("{} -> remote {address}", from.name), from.netns.clone(), *address));
            }
            for address in &outside {
                flows.push((format!("{} -> outside {address}", from.name), from.netns.clone(), *address));
            }
            for address in from.addresses() {
                flows.push((format!("node -> {} {address}", from.name), self.node(), address));
                flows.push((format!("remote -> {} {address}", from.name), self.peer(), address));
            }
        }
        let stop = Arc::new(AtomicBool::new(false));
        let threads = flows
            .into_iter()
            .map(|(name, ns, to)| {
                let stop = Arc::clone(&stop);
                std::thread::spawn(move || {
                    netns::run(&Path::new("/run/netns").join(ns), || flow(&name, to, interval, &stop))
                        .unwrap()
                })
            })
            .collect();
        let probers = Probers { stop, threads };
        std::thread::sleep(Duration::from_millis(300));
        probers
    }
}

/// What times are told from.
pub static START: LazyLock<Instant> = LazyLock::new(Instant::now);

pub struct Probers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Flow>>,
}

pub struct Flow {
    pub name: String,
    pub sent: usize,
    /// When those were sent that no answer came to, or that couldn't be sent.
    pub lost: Vec<Duration>,
    pub stall: Duration,
}

fn flow(name: &str, to: IpAddr, interval: Duration, stop: &AtomicBool) -> Flow {
    let mut echo = Echo::open(to).unwrap();
    let (mut missing, mut lost) = (std::collections::BTreeMap::new(), Vec::new());
    let (mut sent, mut stall, mut next) = (0, Duration::ZERO, Instant::now());
    while !stop.load(Ordering::Relaxed) {
        let at = START.elapsed();
        match echo.send(84) {
            Ok(sequence) => {
                missing.insert(sequence, at);
            }
            Err(_) => lost.push(at),
        }
        sent += 1;
        next += interval;
        stall = stall.max(Instant::now().saturating_duration_since(next));
        while let Ok(sequence) = echo.wait(next.saturating_duration_since(Instant::now())) {
            missing.remove(&sequence);
        }
        next = next.max(Instant::now());
    }
    while let Ok(sequence) = echo.wait(Duration::from_millis(300)) {
        missing.remove(&sequence);
    }
    lost.extend(missing.into_values());
    Flow { name: name.to_owned(), sent, lost, stall }
}

impl Probers {
    /// Stops; nothing may have been lost.
    pub fn none_lost(self, what: &str) {
        let (sent, lost, text) = self.stop();
        println!("{what}: {lost} of {sent} lost; {text}");
        assert_eq!(lost, 0, "{what}: {lost} of {sent} lost: {text}");
    }

    /// Stops them: sent, lost, and a line per flow that lost something.
    pub fn stop(self) -> (usize, usize, String) {
        std::thread::sleep(Duration::from_millis(300));
        self.stop.store(true, Ordering::Relaxed);
        let (mut sent, mut lost, mut text, mut stall) = (0, 0, String::new(), Duration::ZERO);
        for thread in self.threads {
            let flow = thread.join().unwrap();
            sent += flow.sent;
            lost += flow.lost.len();
            stall = stall.max(flow.stall);
            if !flow.lost.is_empty() {
                writeln!(text, "{}: lost {:?} of {}", flow.name, flow.lost, flow.sent).unwrap();
            }
        }
        write!(text, "prober's longest stall {stall:?}").unwrap();
        (sent, lost, text)
    }
}
