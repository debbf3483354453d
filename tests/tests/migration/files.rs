//! What becomes of a node whose journal is damaged, of another version or on a full disk, and whose CNI directory somebody else writes:
//! nothing is changed any more, no pod loses its network, and it is gone on with when the file is repaired.

use std::{fs, time::Duration};

use flannel_migration_tests::{
    bed::Bed,
    migration,
    shape::{NodeShape, Shape},
};
use serde_json::{Value, json};

use super::{
    AGENT, bed, complete, expect_migrated, items, look,
    matrix::{back_to_flannel, begin, delete_agent, journal, meet, replace_agent, rest_on, wait, whole},
    rollback::{command, expect_connected},
    table::Matrix,
};

const JOURNAL: &str = "/var/lib/cni/flannel-migration";
const FOREIGN: &str = "/etc/cni/net.d/05-foreign.conflist";
const LIMIT: Duration = Duration::from_mins(1);

/// Waits until the agent's pod of a node says why it can't go on.
fn pod_says(bed: &Bed, node: &str, words: &str) {
    let (selector, field) = (format!("k8s-app={AGENT}"), format!("spec.nodeName={node}"));
    wait(bed, &format!("the agent's pod says {words:?}"), LIMIT, || {
        let pods = bed.get(&["-n", "kube-system", "pods", "-l", &selector, "--field-selector", &field])?;
        let said = |status: &Value| {
            let of =
                |state: &str| status[state]["terminated"]["message"].as_str().unwrap_or_default().to_owned();
            [of("state"), of("lastState")].iter().any(|message| message.contains(words))
        };
        Ok(items(&pods).iter().any(|pod| said(&pod["status"]["containerStatuses"][0])))
    });
}

/// Waits until the node's report says why a step isn't done.
fn report_says(bed: &Bed, node: &str, words: &str) {
    wait(bed, &format!("the report says {words:?}"), LIMIT, || {
        let now = look(bed, node);
        let report = now["metadata"]["annotations"]["flannel-migration/report"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        Ok(report.contains(words))
    });
}

/// The agent dies, its journal is spoiled, and later repaired.
fn spoil_journal(
    bed: &Bed,
    matrix: &Matrix,
    (fault, words): (&str, &str),
    state: &str,
    spoil: impl Fn(&str) -> String,
) {
    let met = meet(bed, "n1", state, None);
    matrix.reset();
    met.kill();
    let path = journal(bed, "n1");
    let good = fs::read_to_string(&path).unwrap();
    fs::write(&path, spoil(&good)).unwrap();
    delete_agent(bed, "n1");
    pod_says(bed, "n1", words);
    matrix.expect_connected();
    fs::write(&path, good).unwrap();
    replace_agent(bed, "n1", None);
    rest_on(bed, "n1", "calico");
    matrix.expect_connected();
    matrix.row(fault, &met.at, "nothing changed; migrated when it is repaired", None);
    back_to_flannel(bed, "n1");
}

fn shell(bed: &Bed, script: &str) {
    bed.exec("n1", &["sh", "-c", script]).unwrap();
}

/// A small disk for the journal; the agent's pod sees it when it is made anew.
fn small_disk(bed: &Bed) {
    shell(
        bed,
        &format!(
            "mkdir -p {JOURNAL} && cp -a {JOURNAL} /run/kept && mount -t tmpfs -o size=1m tmpfs {JOURNAL} && cp -a /run/kept/. {JOURNAL} && rm -r /run/kept"
        ),
    );
    replace_agent(bed, "n1", None);
}

fn own_disk_again(bed: &Bed) {
    shell(
        bed,
        &format!(
            "cp -a {JOURNAL} /run/kept && umount {JOURNAL} && cp -a /run/kept/. {JOURNAL} && rm -r /run/kept"
        ),
    );
    replace_agent(bed, "n1", None);
}

fn fill(bed: &Bed) {
    shell(
        bed,
        &format!(
            "dd if=/dev/zero of={JOURNAL}/fill bs=4k 2>/dev/null; ! dd if=/dev/zero of={JOURNAL}/more bs=4k count=1 2>/dev/null; rm -f {JOURNAL}/more"
        ),
    );
}

fn disk_full(bed: &Bed, matrix: &Matrix) {
    small_disk(bed);
    let free = format!("rm {JOURNAL}/fill");
    fill(bed);
    matrix.reset();
    command(bed, &["resume", "n1"]);
    report_says(bed, "n1", "No space left");
    whole(bed, "n1", "flannel");
    matrix.expect_connected();
    shell(bed, &free);
    rest_on(bed, "n1", "calico");
    matrix.row("disk full", "flannel, leased", "nothing changed; migrated when there is room", None);
    for (state, op, back) in [
        ("switching", "rename-device", false),
        ("switching", "move-pods", false),
        ("verifying", "remove-rules", false),
        ("reverting", "move-pods", true),
    ] {
        let met = meet(bed, "n1", state, Some(op));
        fill(bed);
        matrix.reset();
        met.go_on();
        report_says(bed, "n1", "No space left");
        matrix.expect_connected();
        shell(bed, &free);
        rest_on(bed, "n1", if back { "flannel" } else { "calico" });
        matrix.expect_connected();
        matrix.row("disk full", &met.at, "nothing changed; gone on with when there is room", None);
    }
    own_disk_again(bed);
}

fn somebody_elses_config(bed: &Bed, matrix: &Matrix) {
    let text = r#"{"cniVersion":"0.3.1","name":"foreign","plugins":[{"type":"loopback"}]}"#;
    let put = format!("echo '{text}' >{FOREIGN}");
    shell(bed, &put);
    matrix.reset();
    command(bed, &["resume", "n1"]);
    let failures = || look(bed, "n1")["metadata"]["annotations"]["flannel-migration/failures"].to_string();
    wait(bed, "n1 is given back", LIMIT, || Ok(failures().contains("AnotherConfigFirst")));
    rest_on(bed, "n1", "flannel");
    matrix.expect_connected();
    shell(bed, &format!("rm {FOREIGN}"));
    rest_on(bed, "n1", "calico");
    matrix.row("another CNI config first", "flannel, leased", "given back; migrated when it is gone", None);

    let met = meet(bed, "n1", "verifying", None);
    matrix.reset();
    shell(bed, &put);
    met.go_on();
    rest_on(bed, "n1", "calico");
    matrix.expect_connected();
    shell(bed, &format!("touch {FOREIGN}"));
    wait(bed, "the agent tells of the config", LIMIT, || {
        Ok(migration::agent_log(bed, "n1")?.contains("another CNI config comes before Calico's"))
    });
    shell(bed, &format!("rm {FOREIGN}"));
    matrix.row("another CNI config first", &met.at, "migrated, and told", None);
}

#[test]
#[ignore = "takes five minutes; hack/faults runs it"]
fn a_journal_or_a_cni_directory_that_is_spoiled_stops_the_node_where_it_is() {
    let scratch = bed("m-files", Shape { nodes: NodeShape::numbered(3), ..Shape::default() });
    let bed = &scratch.bed;
    let environment = [("STRATEGY", "in-place"), ("MAX_FAILURES", "100"), ("NODE_BUDGET", "300s")];
    let prober = begin(bed, "n3", &environment);
    command(bed, &["pause", "n1", "n3"]);
    command(bed, &["resume"]);
    rest_on(bed, "n2", "calico");
    let before = migration::pods::identities(bed).unwrap();
    let matrix = Matrix::new("m-files", &prober);
    let cut_short = |text: &str| text[..text.len() / 2].to_owned();
    let newer = |text: &str| {
        let mut entry: Value = serde_json::from_str(text).unwrap();
        entry["version"] = json!(2);
        entry.to_string()
    };
    let truncated = ("journal truncated", "can't be understood");
    let version = ("journal of a newer version", "is of version 2");
    spoil_journal(bed, &matrix, truncated, "prepared", cut_short);
    spoil_journal(bed, &matrix, truncated, "verifying", cut_short);
    spoil_journal(bed, &matrix, version, "calico", newer);
    disk_full(bed, &matrix);
    somebody_elses_config(bed, &matrix);
    let changed = migration::pods::differences(&before, &migration::pods::identities(bed).unwrap());
    assert!(changed.is_empty(), "{}", changed.join("\n"));
    command(bed, &["resume", "n1", "n3"]);
    complete(bed, Duration::from_mins(4));
    expect_connected(&prober);
    prober.stop().unwrap();
    expect_migrated(bed);
}
