//! What is seen of a migration, by the real programs that look: kubectl, journalctl, promtool, and our own `status`.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::Duration,
};

use flannel_migration_tests::{bed::Bed, promtool::promtool, run};
use serde_json::Value;

use super::{coordinator_pod, items, settings::coordinator};

const AGENT_METRICS: &str = "127.0.0.1:19472";
const COORDINATOR_METRICS: &str = "127.0.0.1:19471";

/// Starts journald on a node, as its own first process would; it ends with the node.
pub fn start_journald(bed: &Bed, node: &str) {
    let settings = "[Journal]\nStorage=volatile\nReadKMsg=no\nAudit=\nRateLimitIntervalSec=0\n";
    let script = format!(
        "mkdir -p /run/systemd/journald.conf.d /run/log/journal && \
         printf '{settings}' > /run/systemd/journald.conf.d/bed.conf && \
         setsid /lib/systemd/systemd-journald </dev/null >/dev/null 2>&1 &"
    );
    bed.exec(node, &["sh", "-c", &script]).unwrap();
    run::wait_for("journald listens", Duration::from_secs(10), || {
        Ok(bed.exec(node, &["test", "-S", "/run/systemd/journal/socket"]).is_ok())
    })
    .unwrap();
}

/// The node's journal tells its migration, by fields.
pub fn expect_journal(bed: &Bed, node: &str) {
    let text =
        bed.exec(node, &["journalctl", "-t", "flannel-migration-agent", "-o", "json", "--no-pager"]).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let holds = |line: &Value, field: &str, value: &str| match &line[field] {
        // A field of the line and of the span around it.
        Value::Array(values) => values.iter().any(|held| held == value),
        held => held == value,
    };
    for (what, fields) in [
        ("a step", &[("STEP", "apply"), ("OP", "swap-config"), ("EPOCH", "1"), ("STATE", "switching")][..]),
        ("a state", &[("REASON", "Migrated"), ("STATE", "calico"), ("EPOCH", "1"), ("STEP", "enter")]),
    ] {
        let found = lines.iter().find(|line| fields.iter().all(|(field, value)| holds(line, field, value)));
        let found = found.unwrap_or_else(|| panic!("{what} ({fields:?}) isn't in the journal:\n{text}"));
        assert!(holds(found, "NODE", node) && holds(found, "PRIORITY", "6"), "{found}");
        assert!(found["MESSAGE"].is_string() && found["_PID"].is_string(), "{found}");
    }
}

fn fetch(bed: &Bed, node: &str, address: &str, path: &str) -> String {
    bed.exec(node, &["busybox", "wget", "-q", "-O", "-", &format!("http://{address}{path}")])
        .unwrap_or_else(|error| panic!("{address}{path} on {node}: {error:#}"))
}

/// One sample's value.
fn sample(metrics: &str, name: &str) -> f64 {
    let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {name} in:\n{metrics}")).parse().unwrap()
}

/// Both programs' figures are what Prometheus reads, and say what happened; `migrated` is a node that was.
pub fn expect_metrics(bed: &Bed, migrated: &str, epoch: u32) {
    let pod = bed.get(&["-n", "kube-system", "pod", &coordinator_pod(bed)]).unwrap();
    let leader = pod["spec"]["nodeName"].as_str().unwrap().to_owned();
    let coordinator = fetch(bed, &leader, COORDINATOR_METRICS, "/metrics");
    let agent = fetch(bed, migrated, AGENT_METRICS, "/metrics");
    for (whose, metrics) in [("coordinator", &coordinator), ("agent", &agent)] {
        let mut check = run::command(promtool().unwrap().to_str().unwrap(), &["check", "metrics"]);
        run::output_with_input(&mut check, metrics.as_bytes())
            .unwrap_or_else(|error| panic!("{whose}: {error:#}\n{metrics}"));
    }
    for path in ["/livez", "/readyz"] {
        assert!(fetch(bed, &leader, COORDINATOR_METRICS, path).starts_with("ok"));
        assert!(fetch(bed, migrated, AGENT_METRICS, path).starts_with("ok"));
    }
    for (name, value) in [
        ("flannel_migration_leading", 1.0),
        ("flannel_migration_phase{phase=\"roll\"}", 1.0),
        ("flannel_migration_nodes{state=\"calico\"}", 1.0),
        ("flannel_migration_nodes_done", 1.0),
        ("flannel_migration_node_duration_seconds_count", 1.0),
    ] {
        assert!((sample(&coordinator, name) - value).abs() < 0.1, "{name} isn't {value}:\n{coordinator}");
    }
    assert!(
        sample(&coordinator, "flannel_migration_node_failures_total{reason=\"RpFilterNotStrict\"}") >= 2.0
    );
    for (name, value) in [
        ("flannel_migration_agent_state{state=\"calico\"}", 1.0),
        ("flannel_migration_agent_state_duration_seconds_count{state=\"switching\"}", 1.0),
        ("flannel_migration_agent_epoch", f64::from(epoch)),
    ] {
        assert!((sample(&agent, name) - value).abs() < 0.1, "{name} isn't {value}:\n{agent}");
    }
    for metrics in [&coordinator, &agent] {
        let calls =
            metrics.lines().any(|line| line.contains("_api_calls_total{method=\"PATCH\",code=\"200\"}"));
        assert!(calls, "no call to the API server is counted:\n{metrics}");
    }
}

/// What an agent at rest takes of its node's memory, in MiB.
pub fn agent_memory(bed: &Bed, node: &str) -> f64 {
    let inside = run::output(&mut run::command("ip", &["netns", "pids", &bed.plan.netns(node)])).unwrap();
    let resident = inside.lines().find_map(|pid| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let ours = field("Name:") == Some("agent");
        ours.then(|| field("VmRSS:")?.strip_suffix(" kB")?.parse::<f64>().ok()).flatten()
    });
    resident.unwrap_or_else(|| panic!("no agent on {node}")) / 1024.0
}

/// The program under the name that kubectl looks for, in a directory for its PATH.
fn plugin() -> (tempfile::TempDir, String) {
    let directory = tempfile::tempdir().unwrap();
    symlink(coordinator(), directory.path().join("kubectl-flannel_migration")).unwrap();
    let path = format!("{}:{}", directory.path().display(), std::env::var("PATH").unwrap());
    (directory, path)
}

fn schema() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/status.schema.json")
}

/// `kubectl flannel-migration status` from outside the cluster, in all forms, and the ConfigMap for dashboards.
pub fn expect_status(bed: &Bed, migrated: &str, failed: &str) {
    let (_directory, path) = plugin();
    let status = |args: &[&str]| {
        let args = [&["flannel-migration", "status"], args].concat();
        run::output(bed.kubectl_command(&args).unwrap().env("PATH", &path)).unwrap()
    };
    let text = status(&[]);
    eprintln!("{text}");
    assert!(text.starts_with("phase roll: 1 of "), "{text}");
    assert!(text.contains("coordinator flannel-migration-") && text.contains("heard of"), "{text}");
    let row = |node: &str| text.lines().find(|line| line.starts_with(node)).unwrap_or_default().to_owned();
    assert!(row(migrated).contains("calico   calico"), "{text}");
    assert!(row(failed).contains("RpFilterNotStrict"), "{text}");
    let remedy = format!("{failed}: RpFilterNotStrict: net.ipv4.conf.all.rp_filter is 2");
    assert!(text.contains(&remedy), "{text}");
    assert!(!text.contains('\u{1b}'), "not plain: {text:?}");

    let schema: Value = serde_json::from_str(&fs::read_to_string(schema()).unwrap()).unwrap();
    let schema = jsonschema::validator_for(&schema).unwrap();
    let json: Value = serde_json::from_str(&status(&["-o", "json"])).unwrap();
    let yaml: Value = serde_saphyr::from_str(&status(&["-o", "yaml"])).unwrap();
    let map = bed.get(&["-n", "kube-system", "configmap", "flannel-migration-status"]).unwrap();
    let kept: Value = serde_json::from_str(map["data"]["status.json"].as_str().unwrap()).unwrap();
    for (form, value) in [("json", &json), ("yaml", &yaml), ("the ConfigMap", &kept)] {
        let errors: Vec<String> = schema.iter_errors(value).map(|error| error.to_string()).collect();
        assert!(errors.is_empty(), "{form}: {}\n{value:#}", errors.join("\n"));
        assert_eq!(value["phase"], "roll", "{form}: {value:#}");
    }
    assert_eq!(map["data"]["nodesDone"], "1");
}

/// `kubectl describe` tells the story of a node and of the Job, each event once and each of the node's `leases`,
/// and who reported it.
pub fn expect_events(bed: &Bed, migrated: &str, leases: u32) {
    let node = bed.kubectl(&["describe", "node", migrated]).unwrap();
    let events: Vec<&str> = node.lines().skip_while(|line| !line.starts_with("Events:")).collect();
    for (reason, reporter, times) in [
        ("LeaseGranted", "flannel-migration-coordinator", leases),
        ("Prepared", "flannel-migration-agent", 1),
        ("Switched", "flannel-migration-agent", 1),
        ("Migrated", "flannel-migration-agent", 1),
        ("Migrated", "flannel-migration-coordinator", 1),
    ] {
        let told = events.iter().filter(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            words.get(1) == Some(&reason) && line.contains(reporter)
        });
        assert_eq!(
            told.count(),
            usize::try_from(times).unwrap(),
            "{reason} by {reporter}:\n{}",
            events.join("\n")
        );
    }
    let condition = node.lines().find(|line| line.trim_start().starts_with("NetworkMigrated"));
    assert!(condition.is_some_and(|line| line.contains("True")), "{node}");
    let job = bed.kubectl(&["-n", "kube-system", "describe", "job", "flannel-migration"]).unwrap();
    for reason in ["PreflightStarted", "PrepareStarted", "RollStarted"] {
        assert_eq!(job.matches(reason).count(), 1, "{reason}:\n{job}");
    }
}

/// After the end: the Job tells it, and the status stays for whoever looks later.
pub fn expect_end(bed: &Bed) {
    let job = bed.kubectl(&["-n", "kube-system", "describe", "job", "flannel-migration"]).unwrap();
    for reason in ["FinishStarted", "MigrationComplete"] {
        assert_eq!(job.matches(reason).count(), 1, "{reason}:\n{job}");
    }
    let (_directory, path) = plugin();
    let args = ["flannel-migration", "status", "--watch"];
    let text = run::output(bed.kubectl_command(&args).unwrap().env("PATH", &path)).unwrap();
    let nodes = items(&bed.get(&["nodes"]).unwrap()).len();
    assert!(text.contains(&format!("phase complete, {nodes}/{nodes} nodes")), "{text}");
}
