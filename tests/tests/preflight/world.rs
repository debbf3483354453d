//! A cluster that is ready to be migrated, as far as the API server knows.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::Context as _;
use flannel_migration_tests::{
    bed::{
        Bed,
        flannel::{documents, manifest},
    },
    images, run,
    scratch::Scratch,
    shape::Shape,
};
use serde_json::{Value, json};

const TESTBED: &str = env!("CARGO_BIN_EXE_testbed");
pub const FLANNEL: [&str; 4] = ["-n", "kube-flannel", "daemonset", "kube-flannel-ds"];
pub const FLANNEL_CONFIG: [&str; 4] = ["-n", "kube-flannel", "configmap", "kube-flannel-cfg"];
pub const CALICO: [&str; 4] = ["-n", "kube-system", "daemonset", "calico-node"];
pub const CALICO_CONFIG: [&str; 4] = ["-n", "kube-system", "configmap", "calico-config"];

pub struct World {
    pub scratch: Scratch,
    program: PathBuf,
    pub looks: usize,
    pub produced: BTreeSet<String>,
    beating: Arc<AtomicBool>,
    heart: Option<JoinHandle<()>>,
}

/// The strategy that isn't the default.
pub const DRAIN: &[(&str, &str)] = &[("STRATEGY", "drain")];

/// One finding as `-o json` prints it.
#[derive(Debug, Clone, serde::Deserialize)]
pub struct Found {
    pub severity: String,
    pub reason: String,
    pub object: String,
    #[serde(rename = "found")]
    pub what: String,
    pub remedy: String,
}

fn workspace(path: &str) -> Vec<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path);
    documents(&fs::read_to_string(path).unwrap()).unwrap()
}

/// The manifests without their Jobs: nothing could run them here.
pub fn ours() -> Vec<Value> {
    let mut all = workspace("manifests/migration-job.yaml");
    all.extend(workspace("manifests/preflight/preflight.yaml"));
    all.retain(|object| object["kind"] != "Job");
    all
}

/// What the agent of node `number` would see.
pub fn host(number: u8) -> Value {
    json!({
        "rpFilter": 1,
        "vxlan": [{ "name": "flannel.1", "vni": 1, "port": 8472, "mac": mac(number), "mtu": 1450 }],
        "plugins": ["bridge", "flannel", "host-local", "loopback", "portmap"],
        "interfaces": [{ "name": "eth0", "addresses": [format!("172.16.0.{number}/24")] }],
    })
}

fn mac(number: u8) -> String {
    format!("8e:74:9a:30:24:{number:02x}")
}

/// A report of an agent at rest.
pub fn report(host: &Value) -> String {
    json!({ "state": "flannel", "since": "2026-01-02T03:04:05Z", "reason": "Started", "host": host })
        .to_string()
}

/// A Node that flannel runs on. Without `cidr` it is the controller manager's to give one.
pub fn node(number: u8, cidr: Option<&str>) -> Value {
    let prefix = "flannel.alpha.coreos.com";
    let spec = cidr.map_or_else(|| json!({}), |cidr| json!({ "podCIDR": cidr, "podCIDRs": [cidr] }));
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {
            "name": format!("n{number}"),
            "labels": {
                "kubernetes.io/os": "linux", "kubernetes.io/hostname": format!("n{number}"),
                "flannel-migration/state": "flannel",
            },
            "annotations": {
                format!("{prefix}/backend-type"): "vxlan",
                format!("{prefix}/backend-data"): json!({ "VNI": 1, "VtepMAC": mac(number) }).to_string(),
                format!("{prefix}/public-ip"): format!("172.16.0.{number}"),
                format!("{prefix}/kube-subnet-manager"): "true",
                "flannel-migration/report": report(&host(number)),
            },
        },
        "spec": spec,
    })
}

/// The pod network of nodes 1 and 2, which have all there is.
pub fn cidr(number: u8) -> String {
    format!("10.244.{}.0/24", number - 1)
}

impl World {
    pub fn new(name: &str) -> Self {
        // Room for two nodes: the controller manager has nothing left to give to a third.
        let shape = Shape { pod_cidr: "10.244.0.0/23".parse().unwrap(), ..Shape::default() };
        let program = images::coordinator().unwrap();
        let scratch = Scratch::up_without_nodes(name, shape, TESTBED).unwrap();
        let mut world = Self {
            scratch,
            program,
            looks: 0,
            produced: BTreeSet::new(),
            beating: Arc::new(AtomicBool::new(true)),
            heart: None,
        };
        let bed = world.bed();
        run::wait_for("the controllers run", Duration::from_mins(1), || {
            bed.kubectl(&["-n", "kube-system", "get", "serviceaccount", "default"]).map(|_| true)
        })
        .unwrap();
        bed.apply(&manifest(&bed.parts, &bed.shape).unwrap()).unwrap();
        bed.apply_calico().unwrap();
        bed.apply(&ours()).unwrap();
        for number in [1, 2] {
            world.join(number, Some(&cidr(number)));
        }
        for account in ["preflight", "controller"] {
            world.write_kubeconfig(account);
        }
        world.heart = Some(world.beat());
        world
    }

    pub fn bed(&self) -> &Bed {
        &self.scratch.bed
    }

    pub fn kubectl(&self, args: &[&str]) -> String {
        self.bed().kubectl(args).unwrap()
    }

    pub fn apply(&self, objects: &[Value]) {
        self.bed().apply(objects).unwrap();
    }

    /// Adds a node that its kubelet says is ready.
    pub fn join(&self, number: u8, cidr: Option<&str>) {
        self.create(&node(number, cidr));
        self.ready(number, "True");
    }

    pub fn leave(&self, number: u8) {
        self.kubectl(&["delete", "node", &format!("n{number}")]);
    }

    pub fn create(&self, object: &Value) {
        let mut command = self.bed().kubectl_command(&["create", "-f", "-"]).unwrap();
        run::output_with_input(&mut command, object.to_string().as_bytes()).unwrap();
    }

    pub fn ready(&self, number: u8, status: &str) {
        set_ready(self.bed(), number, status).unwrap();
    }

    /// Changes an object, and returns how it was.
    pub fn edit(&self, target: &[&str], change: impl FnOnce(&mut Value)) -> Value {
        let original = self.bed().get(target).unwrap();
        let mut changed = original.clone();
        change(&mut changed);
        assert_ne!(original, changed, "{target:?}: nothing was changed");
        self.put(&changed);
        original
    }

    /// Puts an object as it is given.
    pub fn put(&self, object: &Value) {
        let mut object = object.clone();
        let metadata = object["metadata"].as_object_mut().unwrap();
        metadata.remove("resourceVersion");
        metadata.remove("managedFields");
        // Controllers write too, and come in between.
        run::wait_for("the object is put", Duration::from_secs(20), || {
            let mut command = self.bed().kubectl_command(&["replace", "-f", "-"])?;
            run::output_with_input(&mut command, object.to_string().as_bytes()).map(|_| true)
        })
        .unwrap();
    }

    /// Changes an object so that exactly these findings come, and back so that they go.
    pub fn case(
        &mut self,
        target: &[&str],
        expected: &[(&str, &str)],
        change: impl FnOnce(&mut Value),
    ) -> Vec<Found> {
        let original = self.edit(target, change);
        let found = self.expect(expected);
        self.put(&original);
        self.expect_clear();
        found
    }

    /// Looks with these environment variables.
    pub fn look(&mut self, environment: &[(&str, &str)]) -> Vec<Found> {
        self.try_look(environment).unwrap()
    }

    fn try_look(&mut self, environment: &[(&str, &str)]) -> anyhow::Result<Vec<Found>> {
        self.looks += 1;
        let output = self.coordinator("preflight", environment, &["preflight", "-o", "json"]);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        // A definition that was just made isn't served at once.
        let found: Vec<Found> = serde_json::from_str(&text).with_context(|| format!("{text}\n{errors}"))?;
        let stops = found.iter().any(|finding| finding.severity != "warning");
        let status = output.status.code().unwrap();
        assert_eq!(status, i32::from(stops), "go or no go: {found:#?}");
        self.produced.extend(found.iter().map(|finding| finding.reason.clone()));
        Ok(found)
    }

    /// The coordinator with the rights of an account of ours.
    pub fn coordinator(&self, account: &str, environment: &[(&str, &str)], args: &[&str]) -> Output {
        let mut command = Command::new("timeout");
        command.arg("30").arg(&self.program).args(args).env("KUBECONFIG", self.kubeconfig(account));
        command.envs(environment.iter().copied()).output().unwrap()
    }

    /// Looks until exactly these findings come: reason and part of the object.
    pub fn expect(&mut self, expected: &[(&str, &str)]) -> Vec<Found> {
        self.expect_with(&[], expected)
    }

    pub fn expect_with(&mut self, environment: &[(&str, &str)], expected: &[(&str, &str)]) -> Vec<Found> {
        let mut last = Vec::new();
        // Controllers need a moment for what they make of a change.
        let waited = run::wait_for("the findings come", Duration::from_secs(20), || {
            last = self.try_look(environment)?;
            Ok(last.len() == expected.len()
                && last.iter().all(|found| {
                    expected
                        .iter()
                        .any(|(reason, object)| found.reason == *reason && found.object.contains(object))
                }))
        });
        if let Err(error) = waited {
            panic!("{error:#}: expected {expected:#?}, found {last:#?}");
        }
        for found in &last {
            assert!(!found.what.is_empty() && !found.remedy.is_empty(), "{found:#?}");
        }
        last
    }

    /// Looks until the findings are as wanted.
    pub fn until(&mut self, holds: impl Fn(&[Found]) -> bool) -> Vec<Found> {
        let mut last = Vec::new();
        let waited = run::wait_for("the findings come", Duration::from_secs(20), || {
            last = self.try_look(&[])?;
            Ok(holds(&last))
        });
        assert!(waited.is_ok(), "found {last:#?}");
        last
    }

    pub fn expect_clear(&mut self) {
        self.expect(&[]);
    }

    /// Runs the `kubectl` commands that a remedy names, as they stand there.
    pub fn follow(&self, remedy: &str) {
        let commands: Vec<&str> = remedy
            .split(';')
            .filter_map(|part| part.split_once("kubectl ").map(|(_, command)| command))
            .collect();
        assert!(!commands.is_empty(), "no command in: {remedy}");
        for command in commands {
            let words: Vec<&str> = command.split_whitespace().collect();
            self.kubectl(&words);
        }
    }

    /// By the API server's own record, preflight only ever read, and a run that was refused wrote about itself only: its leadership, its
    /// status and events.
    pub fn expect_nothing_written(&self) {
        let log = self.bed().plan.directory().join("control/audit.log");
        let text = fs::read_to_string(log).unwrap();
        let mut seen = 0;
        for event in text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
            let user = event["user"]["username"].as_str().unwrap_or_default();
            if !user.starts_with("system:serviceaccount:kube-system:flannel-migration-") {
                continue;
            }
            seen += 1;
            let verb = event["verb"].as_str().unwrap();
            let resource = event["objectRef"]["resource"].as_str().unwrap_or_default();
            let uri = event["requestURI"].as_str().unwrap();
            let harmless = ["get", "list", "watch"].contains(&verb)
                || resource.ends_with("subjectaccessreviews")
                || user.ends_with("-controller") && ["leases", "events"].contains(&resource)
                || user.ends_with("-controller") && event["objectRef"]["name"] == "flannel-migration-status"
                || uri.contains("dryRun=All");
            assert!(harmless, "{user}: {verb} {uri}");
        }
        assert!(seen > 500, "the audit log tells of {seen} calls only");
    }

    fn kubeconfig(&self, account: &str) -> PathBuf {
        self.bed().plan.directory().join(format!("{account}.json"))
    }

    fn write_kubeconfig(&self, account: &str) {
        let name = format!("flannel-migration-{account}");
        let token = self.kubectl(&["-n", "kube-system", "create", "token", &name, "--duration=1h"]);
        let text = fs::read_to_string(self.bed().plan.kubeconfig()).unwrap();
        let mut config: Value = serde_json::from_str(&text).unwrap();
        config["users"][0]["user"] = json!({ "token": token.trim() });
        fs::write(self.kubeconfig(account), config.to_string()).unwrap();
    }

    /// Says again and again what kubelets would: else the controllers take the nodes for dead.
    fn beat(&self) -> JoinHandle<()> {
        let (bed, beating) = (self.scratch.bed.clone(), Arc::clone(&self.beating));
        std::thread::spawn(move || {
            while beating.load(Ordering::Relaxed) {
                for number in [1, 2] {
                    // One that isn't there at the moment needs none.
                    let _ = set_ready(&bed, number, "True");
                }
                std::thread::park_timeout(Duration::from_secs(5));
            }
        })
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.beating.store(false, Ordering::Relaxed);
        if let Some(heart) = self.heart.take() {
            heart.thread().unpark();
            let _ = heart.join();
        }
    }
}

fn set_ready(bed: &Bed, number: u8, status: &str) -> anyhow::Result<()> {
    let now = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    let patch = json!({ "status": {
        "addresses": [{ "type": "InternalIP", "address": format!("172.16.0.{number}") }],
        "allocatable": { "cpu": "4", "memory": "8Gi", "pods": "110" },
        "capacity": { "cpu": "4", "memory": "8Gi", "pods": "110" },
        "conditions": [{
            "type": "Ready", "status": status, "reason": "Test", "message": "", "lastHeartbeatTime": now,
            "lastTransitionTime": "2026-01-02T03:04:05Z",
        }],
    }});
    let name = format!("n{number}");
    bed.kubectl(&[
        "patch",
        "node",
        &name,
        "--subresource=status",
        "--type=strategic",
        "-p",
        &patch.to_string(),
    ])
    .map(drop)
}
