//! What the coordinator and the agents say to each other, and what each may rely on.
//!
//! This text is the specification of the protocol. The crate does no I/O: it turns labels and annotations
//! of a Node into typed values and back.
//!
//! # Carriers: one object, one writer for each key
//!
//! Everything is on the Node object, so that the state of a migration is where an administrator looks, and
//! survives the loss of every process of ours. Nothing is ever sent from process to process.
//!
//! | key | kind | writer | value |
//! |---|---|---|---|
//! | `flannel-migration/lease` | label | coordinator | the [`Epoch`] of the lease; absent: no lease |
//! | `flannel-migration/grant` | annotation | coordinator | JSON [`Grant`], written in the same patch as the lease |
//! | `flannel-migration/cordoned` | annotation | coordinator | `true`: the coordinator cordoned the node, and only then uncordons it |
//! | `flannel-migration/clearing` | taint | coordinator | `NoSchedule`: pods that can't be adopted must not come back by their DaemonSets before Calico's network is there |
//! | `flannel-migration/failures` | annotation | coordinator | JSON [`Failures`], so that the back-off survives a restart |
//! | `flannel-migration/state` | label | agent | one [`State`] |
//! | `flannel-migration/report` | annotation | agent | JSON [`Report`], written in the same patch as the state |
//! | `flannel-migration/adopted` | annotation | agent | JSON array of [`Adopted`], written in the same patch as state `verifying` |
//! | `flannel-migration/kept` | annotation | agent | JSON array of addresses: the bridge's, which the node itself keeps while connections of its own use them |
//! | `flannel-migration/strategy` | annotation | administrator | a [`Strategy`] for this node only |
//! | `flannel-migration/pause` | label | administrator | any value: this node is not started |
//! | `flannel-migration/request` | annotation | administrator | a [`Request`] about this node; on the Job, about the whole cluster |
//! | `NetworkMigrated` | condition | agent | True, False or Unknown, with reason and message |
//! | `projectcalico.org/node-network-during-migration` | label | coordinator | a [`Network`]; it moves the pods of flannel's and Calico's DaemonSets |
//!
//! An agent says all of its keys in one patch, of the Node's status: state, report, adopted, kept and condition are of one moment. It
//! tells each state that it enters, and within a state what somebody depends on, at once; step and message, which only people read,
//! when they have been true for two seconds: most steps are over before.
//!
//! The same table as data is [`keys::KEYS`]; a test keeps both and the admission policy of the manifests equal.
//!
//! # States
//!
//! A state's documentation ([`State`]) says what is *true* while the label carries it.
//!
//! ```text
//!             lease n, grant n        evicted, network=none       Calico registered, network=calico
//!  flannel ───────────► preparing ──► prepared ──► switching ──► verifying ──► calico
//!  (rest)                   │            │             │             │         (rest)
//!    ▲                      │            │             │             ▼            │ grant: rollback
//!    │◄─────────────────────┴────────────┴─────────────┤◄─────── reverting ◄──────┘
//!    │          nothing was changed, or all undone     │             │
//!    └─────────────────────────────────────────────────┘             ▼
//!                                                       └────────► stuck (a person is needed)
//! ```
//!
//! # Before a lease
//!
//! An agent at rest in `flannel` tells in its report what it sees on its host ([`HostFacts`]): settings, devices, plugins, addresses. It
//! changes nothing. The coordinator judges them before a run, and names all nodes that aren't fit at once.
//!
//! # The dance of one node
//!
//! 1. The coordinator writes lease *n* and the grant, one patch with the Node's resourceVersion as precondition.
//! 2. The agent, if *n* is newer than what its journal knows: `preparing`, then `prepared` with the list of pods
//!    that can't be adopted; nothing on the host is changed. If the node isn't fit: back to `flannel` with the reason.
//! 3. The coordinator evicts (strategy `drain`: all that a drain evicts; `in-place`: exactly the list) and sets
//!    network `none`, so that flannel's pod leaves. What was evicted must not come back before the switch: the node is cordoned, and
//!    tainted where a DaemonSet would make a pod again in spite of that. If it can't, it takes lease and grant away; an agent in
//!    `preparing` or `prepared` whose lease is gone goes to `flannel`.
//! 4. The agent, when flanneld is provably gone: `switching`. Bounded, journalled, needs no API. Any failure is undone.
//! 5. `verifying`, with the pods taken over in `adopted`.
//!    The bridge's address goes with the bridge, but connections from the node itself to its pods come from it: the node keeps it, and
//!    says so in `kept`, until no connection uses it, or the grant's `keepSeconds` in `calico` have passed.
//! 6. The coordinator registers these addresses in Calico's IPAM, so that nobody else gets them, and sets network `calico`.
//! 7. The agent waits for Felix, removes what flannel left, verifies with traffic: `calico`. Else `reverting`: the
//!    coordinator answers with network `none`, the agent undoes the switch: `flannel`. The coordinator releases
//!    the addresses and sets network `flannel`.
//! 8. The coordinator puts the node back to work and takes lease and grant away: the slot is free.
//!
//! # Requests
//!
//! An administrator pauses, aborts and rolls back by [`keys::PAUSE`] and [`keys::REQUEST`]; the commands `coordinator pause`, `abort`,
//! `rollback` and `resume` are that person's hand, and the coordinator that leads only reads these keys. For the whole cluster the
//! carrier is the Job `flannel-migration`: it is what people look at, it lives as long as the migration, and its pod can be replaced
//! without it. It has one writer too, for the coordinator writes but `spec.suspend` there: an aborted or rolled back migration is a
//! suspended Job, which Kubernetes shows as such and starts again when told.
//!
//! The narrower request wins: that on the Node, then the node's pause, then that on the Job. A request never takes a lease away from a
//! node whose host may have been changed: it waits until the agent is at rest. A lease whose agent is `preparing` or `prepared` under
//! network `flannel` is called off by taking lease and grant away.
//!
//! *Rollback* is a lease like any other, granted to a node at rest in `calico`: `reverting` -> `flannel`, as in step 7. What the switch
//! changed is undone as it was captured. A pod that Calico made meanwhile isn't in the journal: it keeps its link, its address and its
//! routes, its address is reserved in flannel's IPAM before flannel's config is back, and the report's `evict` names it; the coordinator
//! evicts it once flannel's pod is ready there, if somebody makes it again. When all nodes are back, the coordinator frees flannel from
//! the network label and takes back what Calico was given.
//!
//! # The end
//!
//! When every node is at rest in `calico` without a lease, the coordinator removes flannel, waits until no node keeps an address any more
//! and gives these back to Calico, then removes all keys but the administrator's from
//! the nodes: the agents' too, which have nothing to say any more. An agent whose journal says `calico` and whose node carries none of
//! our labels writes no key again, and removes its journal. An agent that starts on a node with neither journal nor flannel nor a network
//! label writes none either. A node that joins in mid-run never has flannel: the coordinator labels it network `calico`, and its agent
//! reports `calico` when Felix is ready there.
//!
//! # Invariants
//!
//! 1. *Slots.* The nodes whose slot is used ([`NodeView::slot_used`]) never outnumber max-unavailable. A slot is used
//!    while a lease is there, or the state is not at rest, or one of both can't be read.
//! 2. *No act without a grant.* An agent starts work only if lease and grant are well formed, agree on the epoch
//!    ([`NodeView::granted`]), and the epoch is newer than every epoch in its journal. A restart of the agent resumes an
//!    unfinished epoch and never begins a finished one again.
//! 3. *Durable before changed.* Nothing on the host is changed before the journal holds the original, durably.
//! 4. *Rest or stuck.* From every state, a crash at any point included, the agent reaches a rest state or `stuck`.
//! 5. *Bad text is a value.* What can't be read is [`Field::Malformed`]: it never grants, never acts, never drops a node
//!    from the count, and never panics. Unknown fields of JSON objects are ignored.
//! 6. *One writer.* Nobody writes another's key; for agents the API server enforces it (ValidatingAdmissionPolicy).
//! 7. *An overdue lease is an alarm*, never a hand-over: a slot comes free only by the agent reaching rest.
//! 8. *Fencing.* The grant carries the number of leadership changes; an agent refuses a fence lower than one it has seen.

pub mod grant;
pub mod host;
pub mod keys;
pub mod report;
pub mod request;
pub mod state;
pub mod template;
pub mod view;

pub use grant::{CalicoFacts, Epoch, FlannelFacts, Goal, Grant, Strategy};
pub use host::{HostFacts, Interface, VxlanDevice};
pub use keys::{KEYS, Key, Kind, Writer};
pub use report::{Adopted, Evict, Failures, Report};
pub use request::Request;
pub use state::{Network, State};
pub use view::{Field, Malformed, NodeView};
