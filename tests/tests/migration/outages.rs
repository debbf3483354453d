//! The API server is down, or its store is started anew, while a node is at each moment of its way. What has begun ends without them;
//! the rest waits, and goes on when they are back.

use std::{thread::sleep, time::Duration};

use flannel_migration_tests::{
    bed::{Bed, control},
    probe::{Kind, Prober},
    shape::{NodeShape, Shape},
};

use super::{
    bed, complete, expect_migrated,
    faults::outage,
    matrix::{Moment, back_to_flannel, begin, forget_failures, rest, rest_on, whole},
    rollback::command,
    table::{Losses, Matrix, connected},
};

const IN_PLACE: [Moment; 9] = [
    Moment("preparing", None, None),
    Moment("prepared", None, None),
    Moment("prepared", None, Some("none")),
    Moment("switching", Some("swap-config"), None),
    Moment("switching", Some("move-pods"), None),
    Moment("verifying", None, None),
    Moment("verifying", None, Some("calico")),
    Moment("calico", None, None),
    Moment("reverting", None, None),
];

/// What differs: pods are evicted before, and some are made anew after.
const DRAIN: [Moment; 4] = [
    Moment("prepared", None, None),
    Moment("prepared", None, Some("none")),
    Moment("verifying", None, Some("calico")),
    Moment("calico", None, None),
];

/// What is stopped, and for how long.
#[derive(Clone, Copy)]
enum Fault {
    ApiServer,
    Etcd,
}

impl Fault {
    fn pass(self, bed: &Bed, in_it: impl FnOnce()) {
        match self {
            Self::ApiServer => control::stop_apiserver(bed).unwrap(),
            Self::Etcd => control::stop_etcd(bed).unwrap(),
        }
        in_it();
        // Nothing to wait on: the time itself is the fault.
        match self {
            Self::ApiServer => {
                sleep(outage());
                control::start_apiserver(bed).unwrap();
            }
            Self::Etcd => {
                sleep(Duration::from_secs(5));
                control::start_etcd(bed).unwrap();
            }
        }
        control::wait(bed).unwrap();
    }

    fn name(self) -> String {
        match self {
            Self::ApiServer => format!("API server down for {} s", outage().as_secs()),
            Self::Etcd => "etcd down for 5 s".to_owned(),
        }
    }
}

/// Meets `n1` at a moment, and takes the API server or its store away from then on; what of it mustn't be.
fn fail_at(
    bed: &Bed,
    prober: &Prober,
    matrix: &Matrix,
    fault: Fault,
    strategy: &str,
    moment: &Moment,
) -> Option<String> {
    let (met, at) = moment.reach(bed, "n1", strategy);
    matrix.reset();
    fault.pass(bed, || met.go_on());
    let network = rest(bed, "n1", Duration::from_mins(4));
    matrix.count();
    // A moment in which the node's kubelet, and thereby its pods' places behind Services, is thought to be gone isn't ours.
    connected(prober, Duration::from_mins(1));
    let losses = matrix.row(&fault.name(), &at, &network, None);
    // Kubernetes' own controllers take minutes after an outage until they see what has changed: then calico-node comes too late for the
    // node's budget, and the node has gone back.
    assert!(network == "flannel" || !moment.back(), "{at}: {network}");
    whole(bed, "n1", &network);
    back_to_flannel(bed, "n1");
    connected(prober, Duration::from_mins(1));
    if strategy == "in-place" { beyond_services(&losses, &at, &network) } else { None }
}

// After an outage the controller manager takes every node for gone until its kubelet has written again, and Services lose the pods there:
// with and without a migration.
fn beyond_services(losses: &Losses, at: &str, network: &str) -> Option<String> {
    let mut others = losses.beyond_services();
    // flanneld makes its masquerade rules anew when it comes back to the node.
    others.retain(|kind| network != "flannel" || *kind != Kind::PodToOutside);
    (!others.is_empty()).then(|| format!("{at}: lost on {others:?}"))
}

#[test]
#[ignore = "takes half an hour; hack/faults runs it"]
fn an_outage_of_the_api_server_or_of_etcd_at_any_moment_loses_no_pods_traffic() {
    let scratch = bed("m-outages", Shape { nodes: NodeShape::numbered(3), ..Shape::default() });
    let bed = &scratch.bed;
    let environment = [("STRATEGY", "in-place"), ("MAX_FAILURES", "100"), ("NODE_BUDGET", "240s")];
    let prober = begin(bed, "n3", &environment);
    // One other node is Calico's, and one is flannel's, all the while.
    command(bed, &["pause", "n1", "n3"]);
    command(bed, &["resume"]);
    rest_on(bed, "n2", "calico");
    let matrix = Matrix::new("m-outages", &prober);
    matrix.reset();
    Fault::ApiServer.pass(bed, || ());
    matrix.count();
    connected(&prober, Duration::from_mins(1));
    let losses = matrix.row(&Fault::ApiServer.name(), "no node in change", "as before", None);
    // One after another whatever is found: a moment takes minutes.
    let mut found: Vec<String> =
        beyond_services(&losses, "no node in change", "as before").into_iter().collect();
    for (strategy, moments) in [("in-place", &IN_PLACE[2..7]), ("drain", &DRAIN[1..3])] {
        for moment in moments {
            found.extend(fail_at(bed, &prober, &matrix, Fault::Etcd, strategy, moment));
        }
    }
    for (strategy, moments) in [("in-place", &IN_PLACE[..]), ("drain", &DRAIN[..])] {
        for moment in moments {
            found.extend(fail_at(bed, &prober, &matrix, Fault::ApiServer, strategy, moment));
        }
    }
    forget_failures(bed, "n1");
    // The administrator's own.
    bed.kubectl(&["annotate", "node", "n1", "flannel-migration/strategy-"]).unwrap();
    command(bed, &["resume", "n1", "n3"]);
    complete(bed, Duration::from_mins(5));
    connected(&prober, Duration::from_mins(1));
    prober.stop().unwrap();
    expect_migrated(bed);
    assert!(found.is_empty(), "{}", found.join("\n"));
}
