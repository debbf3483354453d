//! Accounting of one flow: what was sent, answered, lost, and the gaps between. Pure: time is handed in as the
//! span since the prober's start, so that a table can play any history.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Why a probe counts as lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// No answer within the time-out.
    TimedOut,
    /// The connection was refused.
    Refused,
    /// The connection was reset or closed before the answer.
    Reset,
    /// The source has no route to the target, or the kernel refused to send for another reason.
    Unreachable,
    /// The socket's buffer is full of packets that don't leave.
    Blocked,
    /// The long-lived connection is not established.
    Disconnected,
    /// The source or the target has never had an address.
    NoEndpoint,
    /// The server saw another source address than the node's: the packet was not masqueraded as it should be.
    WrongSource,
    /// The answer is not what was asked for.
    Malformed,
}

/// The figures of one flow at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Probes sent, those still under way included.
    pub sent: u64,
    /// Probes answered in time.
    pub answered: u64,
    /// Probes not answered in time.
    pub lost: u64,
    /// Lost probes whose answer came after the time-out all the same.
    pub late: u64,
    /// Established connections that broke and had to be opened again.
    pub reconnects: u64,
    /// Lost probes by cause; their sum is `lost`.
    pub causes: BTreeMap<Cause, u64>,
    /// Longest time between two consecutive answers, losses between them or not.
    pub longest_gap: Duration,
    /// Longest time between two consecutive answers with at least one loss between them; zero without losses.
    pub longest_outage: Duration,
    /// Longest time from sending a probe to its answer, of those answered in time.
    pub slowest: Duration,
}

#[derive(Clone, Copy, Debug)]
enum Outcome {
    Waiting,
    Answered(Duration),
    Lost,
}

#[derive(Clone, Copy, Debug)]
struct Sent {
    at: Duration,
    deadline: Duration,
    outcome: Outcome,
}

/// The account of one flow. Gaps are taken in the order of sending, so an answer that overtakes another doesn't
/// hide a loss; counts are taken at once.
#[derive(Debug)]
pub struct Ledger {
    /// Sequence number of the front of `open`.
    front: u64,
    /// First sequence number of the present count: older ones belong to a count that was given up.
    first: u64,
    open: VecDeque<Sent>,
    counts: Counts,
    last_answer: Duration,
    losses_since: u64,
}

impl Ledger {
    /// An empty account that begins `now`.
    #[must_use]
    pub fn new(now: Duration) -> Self {
        Self {
            front: 1,
            first: 1,
            open: VecDeque::new(),
            counts: Counts::default(),
            last_answer: now,
            losses_since: 0,
        }
    }

    /// Begins a new count. Probes under way are forgotten; sequence numbers go on, so their answers can't be
    /// mistaken for those of the new count.
    pub fn reset(&mut self, now: Duration) {
        let next = self.next();
        *self = Self { front: next, first: next, ..Self::new(now) };
    }

    /// Notes a probe sent now and returns its sequence number, which is never 0.
    pub fn send(&mut self, now: Duration, timeout: Duration) -> u64 {
        let sequence = self.next();
        self.open.push_back(Sent { at: now, deadline: now + timeout, outcome: Outcome::Waiting });
        self.counts.sent += 1;
        sequence
    }

    /// Notes the answer to a probe.
    pub fn answer(&mut self, sequence: u64, now: Duration) {
        let Some(sent) = self.waiting(sequence) else {
            // A second answer to an answered probe (a duplicate) lands here too, and only while it is still open.
            if sequence >= self.first && sequence < self.next() && !self.was_answered(sequence) {
                self.counts.late += 1;
            }
            return;
        };
        sent.outcome = Outcome::Answered(now);
        let took = now.saturating_sub(sent.at);
        self.counts.answered += 1;
        self.counts.slowest = self.counts.slowest.max(took);
        self.settle();
    }

    /// Notes that a probe is lost for a known cause before its time-out.
    pub fn lose(&mut self, sequence: u64, cause: Cause) {
        if let Some(sent) = self.waiting(sequence) {
            sent.outcome = Outcome::Lost;
            self.count_loss(cause);
            self.settle();
        }
    }

    /// Gives up the probes whose time is over and hands their sequence numbers to `forget`.
    pub fn expire(&mut self, now: Duration, mut forget: impl FnMut(u64)) {
        while let Some(sent) = self.open.front_mut() {
            if sent.deadline > now {
                break;
            }
            forget(self.front);
            sent.outcome = Outcome::Lost;
            self.count_loss(Cause::TimedOut);
            self.settle();
        }
    }

    /// Moves all deadlines: the prober itself did not run for that long, so it can't have read the answers.
    pub fn defer(&mut self, by: Duration) {
        for sent in &mut self.open {
            sent.deadline += by;
        }
    }

    /// Notes that an established connection broke.
    pub fn reconnect(&mut self) {
        self.counts.reconnects += 1;
    }

    /// Whether a probe is still under way.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        !self.open.is_empty()
    }

    /// The figures up to `now`; an outage still going on counts with its length so far.
    #[must_use]
    pub fn counts(&self, now: Duration) -> Counts {
        let mut counts = self.counts.clone();
        if self.losses_since > 0 {
            let so_far = now.saturating_sub(self.last_answer);
            counts.longest_gap = counts.longest_gap.max(so_far);
            counts.longest_outage = counts.longest_outage.max(so_far);
        }
        counts
    }

    fn next(&self) -> u64 {
        self.front + self.open.len() as u64
    }

    fn slot(&self, sequence: u64) -> Option<usize> {
        usize::try_from(sequence.checked_sub(self.front)?).ok()
    }

    fn waiting(&mut self, sequence: u64) -> Option<&mut Sent> {
        let slot = self.slot(sequence)?;
        self.open.get_mut(slot).filter(|sent| matches!(sent.outcome, Outcome::Waiting))
    }

    fn was_answered(&self, sequence: u64) -> bool {
        self.slot(sequence)
            .and_then(|slot| self.open.get(slot))
            .is_some_and(|sent| matches!(sent.outcome, Outcome::Answered(_)))
    }

    fn count_loss(&mut self, cause: Cause) {
        self.counts.lost += 1;
        *self.counts.causes.entry(cause).or_default() += 1;
    }

    fn settle(&mut self) {
        while let Some(sent) = self.open.front() {
            match sent.outcome {
                Outcome::Waiting => break,
                Outcome::Lost => self.losses_since += 1,
                Outcome::Answered(at) => {
                    let gap = at.saturating_sub(self.last_answer);
                    self.counts.longest_gap = self.counts.longest_gap.max(gap);
                    if self.losses_since > 0 {
                        self.counts.longest_outage = self.counts.longest_outage.max(gap);
                    }
                    self.losses_since = 0;
                    self.last_answer = self.last_answer.max(at);
                }
            }
            self.open.pop_front();
            self.front += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_millis(500);

    fn ms(value: u64) -> Duration {
        Duration::from_millis(value)
    }

    /// Sends one probe every 20 ms and answers each after 1 ms, but for those named.
    fn play(probes: u64, unanswered: &[u64]) -> Ledger {
        let mut ledger = Ledger::new(ms(0));
        for tick in 1..=probes {
            let now = ms(tick * 20);
            ledger.expire(now, |_| ());
            let sequence = ledger.send(now, TIMEOUT);
            if !unanswered.contains(&sequence) {
                ledger.answer(sequence, now + ms(1));
            }
        }
        ledger
    }

    #[test]
    fn a_quiet_flow_has_no_loss_and_a_gap_of_one_interval() {
        let counts = play(100, &[]).counts(ms(2010));
        assert_eq!((counts.sent, counts.answered, counts.lost), (100, 100, 0));
        assert_eq!(counts.longest_outage, ms(0));
        assert_eq!(counts.longest_gap, ms(21), "the first answer is 21 ms after the start");
        assert_eq!(counts.slowest, ms(1));
    }

    #[test]
    fn an_outage_lasts_from_the_last_answer_before_to_the_first_after() {
        for (lost, outage) in [(vec![10], 40), (vec![10, 11, 12], 80), (vec![10, 20, 21], 60)] {
            let mut ledger = play(100, &lost);
            ledger.expire(ms(5000), |_| ());
            let counts = ledger.counts(ms(5000));
            assert_eq!(counts.lost, lost.len() as u64);
            assert_eq!(counts.causes.get(&Cause::TimedOut), Some(&(lost.len() as u64)));
            assert_eq!(counts.longest_outage, ms(outage), "{lost:?}");
            assert_eq!(counts.longest_gap, ms(outage));
        }
    }

    #[test]
    fn an_outage_that_goes_on_counts_with_its_length_so_far() {
        let mut ledger = play(10, &[9, 10]);
        ledger.expire(ms(1000), |_| ());
        assert_eq!(ledger.counts(ms(1000)).longest_outage, ms(1000 - 161));
    }

    #[test]
    fn a_probe_waits_its_time_out_and_no_longer() {
        let mut ledger = Ledger::new(ms(0));
        let sequence = ledger.send(ms(100), TIMEOUT);
        ledger.expire(ms(599), |_| ());
        assert_eq!(ledger.counts(ms(599)).lost, 0);
        let mut forgotten = vec![];
        ledger.expire(ms(600), |probe| forgotten.push(probe));
        assert_eq!(forgotten, [sequence]);
        assert_eq!(ledger.counts(ms(600)).lost, 1);
        ledger.answer(sequence, ms(700));
        let counts = ledger.counts(ms(700));
        assert_eq!((counts.answered, counts.lost, counts.late), (0, 1, 1));
    }

    #[test]
    fn the_probers_own_stall_is_not_a_loss() {
        let mut ledger = Ledger::new(ms(0));
        let sequence = ledger.send(ms(100), TIMEOUT);
        ledger.defer(ms(900));
        ledger.expire(ms(1200), |_| ());
        ledger.answer(sequence, ms(1200));
        let counts = ledger.counts(ms(1200));
        assert_eq!((counts.answered, counts.lost), (1, 0));
    }

    #[test]
    fn answers_out_of_order_and_twice_count_once() {
        let mut ledger = Ledger::new(ms(0));
        let first = ledger.send(ms(20), TIMEOUT);
        let second = ledger.send(ms(40), TIMEOUT);
        ledger.answer(second, ms(45));
        ledger.answer(second, ms(46));
        ledger.answer(first, ms(50));
        let counts = ledger.counts(ms(60));
        assert_eq!((counts.sent, counts.answered, counts.lost, counts.late), (2, 2, 0, 0));
        assert_eq!(counts.longest_gap, ms(50));
    }

    #[test]
    fn a_known_cause_counts_at_once_and_only_once() {
        let mut ledger = Ledger::new(ms(0));
        let sequence = ledger.send(ms(20), TIMEOUT);
        ledger.lose(sequence, Cause::Refused);
        ledger.lose(sequence, Cause::Reset);
        ledger.expire(ms(900), |_| ());
        let counts = ledger.counts(ms(30));
        assert_eq!(counts.lost, 1);
        assert_eq!(counts.causes.into_iter().collect::<Vec<_>>(), [(Cause::Refused, 1)]);
    }

    #[test]
    fn a_reset_forgets_what_was_under_way() {
        let mut ledger = play(10, &[10]);
        let old = 10;
        ledger.reset(ms(300));
        ledger.answer(old, ms(301));
        let new = ledger.send(ms(310), TIMEOUT);
        assert!(new > old);
        ledger.answer(new, ms(312));
        let counts = ledger.counts(ms(320));
        assert_eq!((counts.sent, counts.answered, counts.lost, counts.late), (1, 1, 0, 0));
        assert_eq!(counts.longest_gap, ms(12));
    }
}
