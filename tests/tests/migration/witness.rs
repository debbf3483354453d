//! Sees every version of every node, and says what must never have been: more nodes in change than allowed, a lease given twice, a
//! number that goes back.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    thread::JoinHandle,
};

use flannel_migration_protocol::NodeView;
use flannel_migration_tests::{bed::Bed, probe};
use futures::StreamExt as _;
use k8s_openapi::api::core::v1::Node;
use kube::{
    Api,
    api::PartialObjectMeta,
    runtime::{WatchStreamExt as _, watcher},
};
use tokio::sync::oneshot;

type Seen = Vec<(String, NodeView)>;

/// Watches until it is asked.
pub struct Witness {
    seen: Arc<Mutex<Seen>>,
    stop: oneshot::Sender<()>,
    thread: JoinHandle<()>,
}

/// What was seen, in figures.
#[derive(Debug, PartialEq, Eq)]
pub struct Testimony {
    /// Most slots in use at once.
    pub slots: usize,
    /// Leases given, each with the fence of its grant, in order.
    pub grants: Vec<(String, u64, u64)>,
    /// What must not have been.
    pub wrong: Vec<String>,
}

impl Witness {
    pub fn call(bed: &Bed) -> Self {
        let (seen, kubeconfig) = (Arc::<Mutex<Seen>>::default(), bed.plan.kubeconfig());
        let (stop, mut stopped) = oneshot::channel();
        let shared = Arc::clone(&seen);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let nodes: Api<PartialObjectMeta<Node>> = Api::all(probe::client(&kubeconfig).await.unwrap());
                let events = watcher(nodes, watcher::Config::default().timeout(20)).default_backoff();
                let mut events = std::pin::pin!(events.applied_objects());
                loop {
                    let event = tokio::select! { event = events.next() => event, _ = &mut stopped => return };
                    // The watch goes on by itself.
                    let Some(Ok(node)) = event else { continue };
                    let labels = node.metadata.labels.unwrap_or_default();
                    let annotations = node.metadata.annotations.unwrap_or_default();
                    let view = NodeView::parse(&labels, &annotations);
                    shared.lock().unwrap().push((node.metadata.name.unwrap_or_default(), view));
                }
            });
        });
        Self { seen, stop, thread }
    }

    pub fn ask(self, most: usize) -> Testimony {
        let _ = self.stop.send(());
        self.thread.join().unwrap();
        judge(&self.seen.lock().unwrap(), most)
    }
}

fn judge(seen: &Seen, most: usize) -> Testimony {
    let mut now: BTreeMap<&str, &NodeView> = BTreeMap::new();
    let mut testimony = Testimony { slots: 0, grants: Vec::new(), wrong: Vec::new() };
    for (name, view) in seen {
        let before = now.insert(name, view);
        let used: Vec<&str> =
            now.iter().filter(|(_, view)| view.slot_used()).map(|(name, _)| *name).collect();
        testimony.slots = testimony.slots.max(used.len());
        if used.len() > most {
            testimony.wrong.push(format!("{} in change at once", used.join(", ")));
        }
        let Some(grant) = view.granted() else { continue };
        let given = (name.clone(), grant.epoch.get(), grant.fence);
        if testimony.grants.contains(&given) {
            // The lease in force, or one that came back.
            if before.is_none_or(|before| before.granted() != Some(grant)) {
                testimony.wrong.push(format!("given twice or changed: {given:?}"));
            }
            continue;
        }
        let last =
            testimony.grants.iter().filter(|(node, ..)| node == name).map(|(_, epoch, _)| *epoch).max();
        if last.is_some_and(|last| last >= given.1) {
            testimony.wrong.push(format!("epoch {last:?}, then {given:?}"));
        }
        if let Some((_, _, fence)) = testimony.grants.last().filter(|(_, _, fence)| *fence > given.2) {
            testimony.wrong.push(format!("fence {fence}, then {given:?}"));
        }
        testimony.grants.push(given);
    }
    testimony
}

#[test]
fn a_witness_tells_a_second_slot_and_a_number_that_goes_back() {
    let node = |name: &str, keys: &[(&str, u64, u64)]| {
        let (mut labels, mut annotations) = (BTreeMap::new(), BTreeMap::new());
        for (state, epoch, fence) in keys {
            labels.insert("flannel-migration/state".to_owned(), (*state).to_owned());
            if *epoch > 0 {
                labels.insert("flannel-migration/lease".to_owned(), epoch.to_string());
                let grant = serde_json::json!({
                    "epoch": epoch, "fence": fence, "goal": "migrate", "strategy": "in-place", "budgetSeconds": 60,
                    "flannel": {"networks": ["10.244.0.0/16"], "vni": 1, "port": 8472, "mtu": 1450, "cniConfDir": "/etc/cni/net.d"},
                    "calico": {"cniConfName": "10-calico.conflist", "cniConfTemplate": "{}", "mtu": 1450, "healthPort": 9099,
                               "kubeServiceAddress": "10.96.0.1:443"},
                });
                annotations.insert("flannel-migration/grant".to_owned(), grant.to_string());
            }
        }
        (name.to_owned(), NodeView::parse(&labels, &annotations))
    };
    let good = vec![
        node("n1", &[("flannel", 1, 1)]),
        node("n1", &[("verifying", 1, 1)]),
        node("n1", &[("calico", 0, 0)]),
        node("n2", &[("flannel", 1, 2)]),
        node("n2", &[("flannel", 0, 0)]),
        node("n2", &[("flannel", 2, 2)]),
    ];
    let told = judge(&good, 1);
    assert_eq!((told.slots, told.grants.len(), told.wrong.len()), (1, 3, 0), "{told:?}");
    let twice = [good.clone(), vec![node("n1", &[("calico", 2, 2)])]].concat();
    assert_eq!(judge(&twice, 1).wrong.len(), 1);
    let back = [good[..5].to_vec(), vec![node("n2", &[("flannel", 1, 3)])]].concat();
    assert_eq!(judge(&back, 1).wrong.len(), 1);
    let old = [good[..5].to_vec(), vec![node("n2", &[("flannel", 3, 1)])]].concat();
    assert_eq!(judge(&old, 1).wrong.len(), 1);
}
