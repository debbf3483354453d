//! A coordinator that leads is cut off, or stops, and another takes over; then the first comes back.

use std::{
    fs,
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use flannel_migration_tests::{
    bed::{Bed, layout::API_PORT},
    migration::{self, LEASE_LABEL, STATE_LABEL},
    shape::{NodeShape, Shape},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use super::{
    bed, expect_migrated, label,
    matrix::{begin, wait},
    rollback::command,
    settings::coordinator,
    table::{Matrix, connected},
    witness::Witness,
};

/// Who the Job's coordinator runs as: nobody else on the node does.
const USER: &str = "65532";

/// A coordinator of our own on a node, with the administrator's rights; ended when it goes.
pub struct Second(pub Child);

impl Second {
    /// Starts it under this name; what it logs goes to `<name>.log` of the test bed.
    pub fn start(bed: &Bed, node: &str, name: &str, kubeconfig: &str, environment: &[(&str, &str)]) -> Self {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(bed.plan.directory().join(format!("{name}.log")))
            .unwrap();
        let program = coordinator().display().to_string();
        let mut all = vec![
            ("KUBECONFIG", kubeconfig),
            ("POD_NAME", name),
            ("ADMIN_ADDRESS", "127.0.0.1:0"),
            ("TERMINATION_LOG", "/dev/null"),
        ];
        all.extend(environment);
        let mut args = vec!["env".to_owned()];
        args.extend(all.iter().map(|(key, value)| format!("{key}={value}")));
        args.extend([program, "run".to_owned()]);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        // `nsenter` and `env` become the program: the child is it.
        let mut command = bed.exec_command(node, &args).unwrap();
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        Self(command.spawn().unwrap())
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.0.id()).unwrap())
    }
}

impl Drop for Second {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Who leads, by the Lease, and how often the leadership went over.
fn leader(bed: &Bed) -> (String, u64) {
    let lease = bed.get(&["-n", "kube-system", "lease", "flannel-migration"]).unwrap_or_default();
    let holder = lease["spec"]["holderIdentity"].as_str().unwrap_or_default().to_owned();
    (holder, lease["spec"]["leaseTransitions"].as_u64().unwrap_or(0))
}

fn led_by(bed: &Bed, who: &str) -> u64 {
    wait(bed, &format!("{who} leads"), Duration::from_mins(1), || Ok(leader(bed).0.starts_with(who)));
    leader(bed).1
}

fn state(bed: &Bed, node: &str) -> anyhow::Result<(String, bool)> {
    let now: Value = bed.get(&["node", node])?;
    Ok((label(&now, STATE_LABEL), !label(&now, LEASE_LABEL).is_empty()))
}

/// Lets nothing pass, or everything again, between the Job's coordinator and the API server.
fn cut(bed: &Bed, node: &str, how: &str) {
    let (server, port) = (bed.plan.control().to_string(), API_PORT.to_string());
    let rule = ["iptables", how, "OUTPUT", "-d", &server, "-p", "tcp", "--dport", &port];
    let owner = ["-m", "owner", "--uid-owner", USER, "-j", "DROP"];
    bed.exec(node, &[&rule[..], &owner].concat()).unwrap();
}

#[test]
#[ignore = "takes two minutes; hack/faults runs it"]
fn a_leader_that_is_cut_off_or_stops_is_followed_by_another_and_nothing_is_granted_twice() {
    let scratch = bed("m-partition", Shape { nodes: NodeShape::numbered(4), ..Shape::default() });
    let bed = &scratch.bed;
    let witness = Witness::call(bed);
    let prober = begin(bed, "n4", &[("STRATEGY", "in-place")]);
    let matrix = Matrix::new("m-partition", &prober);
    let first = led_by(bed, "flannel-migration-");
    let admin = bed.plan.kubeconfig_inside("admin").display().to_string();
    let second = Second::start(bed, "n3", "second", &admin, &[("STRATEGY", "in-place")]);
    cut_off_while_a_node_changes(bed, &matrix);
    let next = led_by(bed, "second");
    assert!(next > first, "fence {first}, then {next}");
    stopped_between_two_nodes(bed, &second, &matrix, next);

    // Whichever leads ends it; the other's process then finds that there is nothing left to do.
    wait(bed, "the Job completes", Duration::from_mins(4), || {
        Ok(migration::job(bed)? == migration::Job::Complete)
    });
    connected(&prober, Duration::from_secs(20));
    drop(second);
    prober.stop().unwrap();
    expect_told(witness);
    expect_migrated(bed);
}

/// The Job's coordinator can't reach the API server from the moment at which a node is prepared or later.
fn cut_off_while_a_node_changes(bed: &Bed, matrix: &Matrix) {
    matrix.reset();
    command(bed, &["resume"]);
    wait(bed, "n1 has its lease", Duration::from_mins(1), || Ok(state(bed, "n1")?.1));
    cut(bed, "n4", "-I");
    let at = state(bed, "n1").unwrap().0;
    let began = Instant::now();
    led_by(bed, "second");
    let after = began.elapsed().as_secs();
    wait(bed, "n1 is migrated", Duration::from_mins(2), || {
        Ok(state(bed, "n1")? == ("calico".to_owned(), false))
    });
    cut(bed, "n4", "-D");
    let outcome = format!("another leads after {after} s, n1 is migrated");
    matrix.row("leader cut off for longer than its lease", &format!("n1 {at}"), &outcome, None);
}

/// The one that leads now is stopped just when it gives the next lease, and goes on when the other has given another.
fn stopped_between_two_nodes(bed: &Bed, second: &Second, matrix: &Matrix, fence: u64) {
    let began = Instant::now();
    wait(bed, "a second node has its lease", Duration::from_mins(1), || {
        Ok(state(bed, "n2")?.1 || state(bed, "n2")?.0 == "calico")
    });
    kill(second.pid(), Signal::SIGSTOP).unwrap();
    let at = format!("n2 {}, {:.1} s later", state(bed, "n2").unwrap().0, began.elapsed().as_secs_f32());
    let began = Instant::now();
    let next = led_by(bed, "flannel-migration-");
    assert!(next > fence, "fence {fence}, then {next}");
    let after = began.elapsed().as_secs();
    wait(bed, "n3 has its lease", Duration::from_mins(2), || Ok(state(bed, "n3")?.1));
    kill(second.pid(), Signal::SIGCONT).unwrap();
    let outcome = format!("another leads after {after} s and gives the next lease");
    matrix.row("leader stopped, then back", &at, &outcome, None);
}

fn expect_told(witness: Witness) {
    let told = witness.ask(1);
    eprintln!("m-partition: {told:?}");
    assert_eq!(told.wrong, Vec::<String>::new());
    assert_eq!((told.slots, told.grants.len()), (1, 4), "{told:?}");
    let mut fences: Vec<u64> = told.grants.iter().map(|(_, _, fence)| *fence).collect();
    fences.dedup();
    assert!(fences.len() >= 3, "three leaders gave leases: {told:?}");
}
