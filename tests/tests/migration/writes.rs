//! The coordinator is killed after every write that it makes: the API server's audit log says when one was made, and each successor starts
//! at once.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{Read as _, Seek as _, SeekFrom},
    thread::sleep,
    time::{Duration, Instant},
};

use flannel_migration_tests::{
    bed::Bed,
    migration,
    shape::{NodeShape, Shape},
};
use serde_json::{Value, json};

use super::{
    CONTROLLER, bed, complete, expect_migrated,
    matrix::begin_with,
    partition::Second,
    table::{Matrix, connected},
    witness::Witness,
};

/// A successor may write an object anew that its predecessor wrote: after so many kills at one object's writes of one kind it may live on.
const MOST_OF_A_KIND: usize = 8;

/// As many coordinators as this are started at most.
const MOST: usize = 400;

/// What the coordinator wrote, as the API server logs it.
struct Audit {
    file: File,
    rest: String,
}

impl Audit {
    fn open(bed: &Bed) -> Self {
        let mut file = File::open(bed.plan.directory().join("control/audit.log")).unwrap();
        file.seek(SeekFrom::End(0)).unwrap();
        Self { file, rest: String::new() }
    }

    /// The writes since the last look.
    fn writes(&mut self) -> Vec<Write> {
        self.file.read_to_string(&mut self.rest).unwrap();
        let whole = self.rest.rfind('\n').map_or(0, |end| end + 1);
        let lines: String = self.rest.drain(..whole).collect();
        lines.lines().filter_map(|line| write(&serde_json::from_str(line).ok()?)).collect()
    }
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Write {
    kind: String,
    object: String,
}

/// A write of the coordinator's that changed something. Events are for people; leadership and trials are no part of the migration.
fn write(event: &Value) -> Option<Write> {
    let text = |pointer: &str| event.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
    let verb = text("/verb");
    let resource = text("/objectRef/resource");
    let ours = text("/user/username") == format!("system:serviceaccount:kube-system:{CONTROLLER}")
        && ["create", "update", "patch", "delete", "deletecollection"].contains(&verb)
        && !["events", "leases", "selfsubjectaccessreviews", "selfsubjectrulesreviews"].contains(&resource)
        && !text("/requestURI").contains("dryRun=")
        && event["responseStatus"]["code"].as_u64().is_some_and(|code| code < 300);
    let part = match text("/objectRef/subresource") {
        "" => String::new(),
        part => format!("/{part}"),
    };
    let object = format!("{}/{}", text("/objectRef/namespace"), text("/objectRef/name"));
    ours.then(|| Write { kind: format!("{verb} {resource}{part}"), object })
}

/// The rights of the Job's coordinator, for one that runs outside of the Job.
fn kubeconfig(bed: &Bed) -> String {
    let token = bed.kubectl(&["-n", "kube-system", "create", "token", CONTROLLER, "--duration=2h"]).unwrap();
    let admin = fs::read_to_string(bed.plan.kubeconfig_inside("admin")).unwrap();
    let mut config: Value = serde_json::from_str(&admin).unwrap();
    config["users"][0]["user"]["token"] = json!(token.trim());
    let path = bed.plan.kubeconfig_inside("coordinator");
    fs::write(&path, config.to_string()).unwrap();
    path.display().to_string()
}

/// The successor needs not wait for the end of a leadership whose holder is dead.
fn free_leadership(bed: &Bed) {
    let patch = r#"{"spec":{"holderIdentity":null}}"#;
    // There is none before the first write, and after the last.
    let _ = bed.kubectl(&[
        "-n",
        "kube-system",
        "patch",
        "lease",
        "flannel-migration",
        "--type=merge",
        "-p",
        patch,
    ]);
}

/// Runs one coordinator after another until one comes to the end; returns after which writes they were killed.
fn kill_at_every_write(bed: &Bed, strategy: &str) -> BTreeMap<Write, usize> {
    let (config, mut audit) = (kubeconfig(bed), Audit::open(bed));
    let mut killed: BTreeMap<Write, usize> = BTreeMap::new();
    let until = Instant::now() + Duration::from_mins(15);
    for number in 0..MOST {
        let mut one = Second::start(bed, "n3", &format!("c{number}"), &config, &[("STRATEGY", strategy)]);
        loop {
            if let Some(status) = one.0.try_wait().unwrap() {
                let log = bed.plan.directory().join(format!("c{number}.log"));
                assert!(status.success(), "{status}:\n{}", fs::read_to_string(log).unwrap_or_default());
                return killed;
            }
            let writes = audit.writes();
            let due = |write: &&Write| killed.get(write).is_none_or(|times| *times < MOST_OF_A_KIND);
            if let Some(write) = writes.iter().rev().find(due) {
                *killed.entry(write.clone()).or_default() += 1;
                break;
            }
            assert!(Instant::now() < until, "not through after {number} coordinators: {killed:#?}");
            // The audit log gives no event that is faster than looking.
            sleep(Duration::from_millis(1));
        }
        drop(one);
        free_leadership(bed);
    }
    panic!("not through after {MOST} coordinators: {killed:#?}");
}

fn run(name: &'static str, strategy: &str) {
    let scratch = bed(name, Shape { nodes: NodeShape::numbered(3), ..Shape::default() });
    let bed = &scratch.bed;
    let witness = Witness::call(bed);
    // The Job waits while others do its work.
    let prober = begin_with(bed, &[("STRATEGY", strategy)], |job| job["spec"]["suspend"] = true.into());
    let before = migration::pods::identities(bed).unwrap();
    let matrix = Matrix::new(name, &prober);
    matrix.reset();
    let killed = kill_at_every_write(bed, strategy);
    let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
    for (write, times) in &killed {
        *kinds.entry(&write.kind).or_default() += times;
    }
    for (kind, times) in &kinds {
        eprintln!("| {name} | coordinator killed, {times} times | after {kind} | gone on with |  |");
    }
    let all: usize = kinds.values().sum();
    let losses = matrix.row("coordinator killed", &format!("{strategy}, {all} writes"), "all migrated", None);
    let patch = r#"{"spec":{"suspend":false}}"#;
    bed.kubectl(&["-n", "kube-system", "patch", "job", "flannel-migration", "-p", patch]).unwrap();
    complete(bed, Duration::from_mins(2));
    connected(&prober, Duration::from_mins(1));
    prober.stop().unwrap();
    let told = witness.ask(1);
    assert_eq!((told.wrong, told.slots), (Vec::<String>::new(), 1));
    expect_migrated(bed);
    // Three nodes, each with its claims, its lease, two answers and the lease's end.
    assert!(all >= 40, "only {all} kills: {killed:#?}");
    if strategy == "in-place" {
        assert!(losses.none(), "{losses}");
        let changed = migration::pods::differences(&before, &migration::pods::identities(bed).unwrap());
        assert!(changed.is_empty(), "{}", changed.join("\n"));
    }
}

#[test]
#[ignore = "takes five minutes; hack/faults runs it"]
fn a_coordinator_killed_after_every_write_loses_nothing_in_place() {
    run("m-writes", "in-place");
}

#[test]
#[ignore = "takes five minutes; hack/faults runs it"]
fn a_coordinator_killed_after_every_write_drains_to_the_end() {
    run("m-wr-drain", "drain");
}
