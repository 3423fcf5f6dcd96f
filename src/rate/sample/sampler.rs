//! Which pages are looked at when, and what it adds up to.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::budget::{Goal, MARGIN, SoFar};
use super::cohort::{Cohort, Sight, Visit};
use super::random::Random;
use super::sampled::Sampled;
use super::strata::{EACH, Sample};

/// Times shorter than a window, which some of the pages are looked at again after.
const SHORT: [u64; 7] = [50, 100, 200, 500, 1000, 2000, 5000];
/// Times longer than a window, in seconds.
const LONG: [u64; 8] = [2, 5, 10, 20, 60, 120, 300, 600];
/// Pages of a stratum of a window's sample, and of one for the whole time, that are looked at at the times between.
const SOME: usize = 2;
/// Between two pieces of a sample, at most.
const GAP: Duration = Duration::from_millis(10);
/// In such a part of a window all of its pieces begin.
const SOON: u32 = 20;
/// For so long a page that was there is taken to be there still.
const FRESH: Duration = Duration::from_secs(2);

/// Pages to be looked at now.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Task {
    cohort: u64,
    piece: usize,
    visit: usize,
    /// Their numbers, and whether each was there a moment ago. Of others it has to be asked first: to read a hole would fill it,
    /// to read what is swapped out would bring it back.
    pages: Vec<(u64, bool)>,
}

impl Task {
    /// The pages: their numbers, and whether each was there a moment ago.
    #[must_use]
    pub fn pages(&self) -> &[(u64, bool)] {
        &self.pages
    }
}

/// Looks at pages of a guest, as somebody lets it see them. Each window has a sample of its own; another one is watched for the
/// whole time.
#[derive(Debug)]
pub struct Sampler {
    goal: Goal,
    pages: u64,
    random: Random,
    cohorts: BTreeMap<u64, Cohort>,
    /// When each is due, and of which cohort, piece and visit it is.
    tasks: BTreeSet<(Duration, u64, usize, usize)>,
    /// Pieces that are left of a visit.
    left: BTreeMap<(u64, usize), usize>,
    /// Cohorts so far: the first is the panel, the others are windows in their order.
    begun: u64,
    finishing: bool,
    /// There is no time left for another window.
    no_more: bool,
    found: Sampled,
    looks: u64,
    /// CPU time of the beginning, and now.
    spent: (f64, f64),
    first_guess: f64,
}

/// The cohort that is watched for the whole time.
const PANEL: u64 = 0;

impl Sampler {
    /// Begins. `spent` is the CPU time so far, `per_look` that of a look, about.
    #[must_use]
    pub fn new(goal: Goal, found: Sampled, spent: Duration, per_look: Duration, seed: u64) -> Self {
        let pages = found.pages();
        let spent = spent.as_secs_f64();
        let mut this = Self {
            goal,
            pages,
            random: Random::new(seed),
            cohorts: BTreeMap::new(),
            tasks: BTreeSet::new(),
            left: BTreeMap::new(),
            begun: 0,
            finishing: false,
            no_more: false,
            found,
            looks: 0,
            spent: (spent, spent),
            first_guess: per_look.as_secs_f64().max(1e-8),
        };
        this.panel();
        this
    }

    /// What was found so far.
    #[must_use]
    pub const fn found(&self) -> &Sampled {
        &self.found
    }

    /// CPU time so far.
    pub const fn spend(&mut self, spent: Duration) {
        self.spent.1 = spent.as_secs_f64();
    }

    fn per_look(&self) -> f64 {
        if self.looks < 2000 {
            return self.first_guess;
        }
        (self.spent.1 - self.spent.0).max(1e-6) / self.looks as f64
    }

    fn panel(&mut self) {
        let end = self.goal.duration.unwrap_or(Duration::MAX);
        let times = LONG.iter().map(|seconds| Duration::from_secs(*seconds));
        let between = times.filter(|time| *time > self.goal.interval && *time < end);
        let each = if self.goal.duration.is_some() {
            SOME
        } else {
            EACH
        };
        let mut visits: Vec<_> = between.map(|after| Visit { after, each }).collect();
        if let Some(after) = self.goal.duration {
            visits.push(Visit { after, each: EACH });
        }
        let looks = 1.0 + looks(&visits);
        let wanted = self.goal.panel(self.pages, looks, self.per_look());
        self.begin(wanted, visits, Duration::ZERO);
    }

    /// The next window.
    fn window(&mut self, at: Duration) {
        let interval = self.goal.interval;
        let times = SHORT.iter().map(|ms| Duration::from_millis(*ms));
        // Every other window is enough for them.
        let some = self.begun % 2 == 1;
        let short = times.filter(|time| some && *time < interval);
        let mut visits: Vec<_> = short.map(|after| Visit { after, each: SOME }).collect();
        visits.push(Visit {
            after: interval,
            each: EACH,
        });
        let looks = 1.0 + looks(&visits);
        let (part, variance) = self.found.so_far();
        let so_far = SoFar {
            now: at,
            windows: self.begun - 1,
            part,
            variance,
            spent: self.spent.1,
            reserved: self.owed() * self.per_look(),
            per_look: self.per_look(),
        };
        let wanted = self.goal.window(&so_far, self.pages, looks);
        self.begin(wanted, visits, at);
    }

    fn begin(&mut self, wanted: u64, visits: Vec<Visit>, at: Duration) {
        let sample = Sample::draw(self.pages, wanted, &mut self.random);
        let cohort = Cohort::new(sample, visits);
        let number = self.begun;
        let pieces = u32::try_from(cohort.pieces()).unwrap_or(u32::MAX);
        let gap = GAP.min(self.goal.interval / SOON / pieces.max(1));
        for piece in 0..cohort.pieces() {
            let after = gap * u32::try_from(piece).unwrap_or(u32::MAX);
            self.tasks.insert((at + after, number, piece, 0));
        }
        self.left.insert((number, 0), cohort.pieces());
        self.found.draw(cohort.sample().len() as u64);
        self.cohorts.insert(number, cohort);
        self.begun += 1;
    }

    /// Looks that are still to be made.
    fn owed(&self) -> f64 {
        let of = |(number, cohort): (&u64, &Cohort)| {
            let visits = cohort.visits.iter().enumerate();
            let owed = visits.filter(|(visit, _)| {
                self.goal.duration.is_some() && self.left.get(&(*number, *visit)) != Some(&0)
            });
            let each: usize = owed.map(|(_, visit)| visit.each).sum();
            each as f64 / EACH as f64 * cohort.sample().len() as f64
        };
        self.cohorts.iter().map(of).sum()
    }

    /// When the next window begins: not before the one before is over, so that it is known how many pages it takes.
    fn next_window(&self) -> Option<Duration> {
        let number = self.begun - 1;
        let over = number == 0 || !self.cohorts.contains_key(&number);
        if self.finishing || self.no_more || !over {
            return None;
        }
        let number = u32::try_from(number).ok()?;
        Some(self.goal.interval.saturating_mul(number))
    }

    /// When there is something to be done.
    #[must_use]
    pub fn due(&self) -> Option<Duration> {
        let task = self.tasks.first().map(|task| task.0);
        [task, self.next_window()].into_iter().flatten().min()
    }

    /// What is to be looked at now, if anything is. Before a window begins, [`Self::spend`] should have been told.
    pub fn take(&mut self, now: Duration) -> Option<Task> {
        if self.next_window().is_some_and(|at| at <= now) {
            // One that began late may end late, but not by half of itself.
            let end = now + self.goal.interval / 2;
            self.no_more = self.begun > 1 && self.goal.duration.is_some_and(|d| end > d);
            if !self.no_more {
                self.window(now);
            }
        }
        let (due, cohort, piece, visit) = self.tasks.first().copied()?;
        if due > now {
            return None;
        }
        self.tasks.pop_first();
        if cohort == PANEL && piece == 0 {
            self.enough_in_the_end(visit);
        }
        let of = self.cohorts.get(&cohort)?;
        let fresh = visit > 0 && now.saturating_sub(of.last(piece)) <= FRESH;
        let page = |place| {
            let (page, there) = of.page(place);
            (page, there && fresh)
        };
        Some(Task {
            cohort,
            piece,
            visit,
            pages: of.places(piece, visit).map(page).collect(),
        })
    }

    /// Of what is watched for the whole time no more is looked at in the end than the precision takes: no less has changed than
    /// in a window.
    fn enough_in_the_end(&mut self, visit: usize) {
        let part = self.found.so_far().0.unwrap_or(0.0);
        let wanted = MARGIN * self.goal.pages(part, self.pages);
        let Some(panel) = self.cohorts.get_mut(&PANEL) else {
            return;
        };
        let strata = panel.sample().strata() as f64;
        if self.goal.duration.is_some() && visit > 0 && visit + 1 == panel.visits.len() {
            let enough = |each: &usize| *each as f64 * strata >= wanted;
            panel.visits[visit].each = (SOME..EACH).find(enough).unwrap_or(EACH);
        }
    }

    /// They were looked at, and seen so.
    pub fn see(&mut self, task: &Task, at: Duration, sights: &[Sight]) {
        let Some(cohort) = self.cohorts.get_mut(&task.cohort) else {
            return;
        };
        self.looks += sights.len() as u64;
        cohort.see(task.piece, task.visit, at, sights);
        let next = task.visit + 1;
        if let Some(visit) = cohort.visits.get(next) {
            let due = cohort.first(task.piece) + visit.after;
            self.tasks.insert((due, task.cohort, task.piece, next));
            let pieces = cohort.pieces();
            self.left.entry((task.cohort, next)).or_insert(pieces);
        }
        let left = self.left.entry((task.cohort, task.visit)).or_insert(1);
        *left = left.saturating_sub(1);
        if *left == 0 {
            self.visited(task.cohort, task.visit, at);
        }
    }

    /// All of a visit is done.
    fn visited(&mut self, number: u64, visit: usize, at: Duration) {
        let Some(cohort) = self.cohorts.get(&number) else {
            return;
        };
        let last = visit + 1 == cohort.visits.len();
        let time = cohort.visits[visit].after;
        let (estimate, took) = cohort.changed(visit);
        if number == PANEL {
            if visit == 0 {
                self.found.there(&cohort.there());
            } else if last || self.goal.duration.is_none() {
                if self.goal.duration.is_none() && !self.finishing {
                    self.found.time(time, took, &estimate);
                }
                self.found.whole(at, took, &estimate, cohort.weighed(visit));
            } else {
                self.found.time(time, took, &estimate);
            }
        } else if last {
            self.found
                .window(at, took, &estimate, cohort.weighed(visit));
        } else if visit > 0 {
            self.found.time(time, took, &estimate);
        }
        self.found.cost(self.looks, self.spent.1);
        if !last {
            return;
        }
        if number == PANEL && self.goal.duration.is_none() && !self.finishing {
            // On, without end.
            if let Some(cohort) = self.cohorts.get_mut(&number) {
                let step = Duration::from_secs(LONG[LONG.len() - 1]);
                let after = time + step;
                cohort.visits.push(Visit { after, each: EACH });
                for piece in 0..cohort.pieces() {
                    let due = cohort.first(piece) + after;
                    self.tasks.insert((due, number, piece, visit + 1));
                }
                self.left.insert((number, visit + 1), cohort.pieces());
            }
        } else {
            self.cohorts.remove(&number);
            self.left.retain(|(of, _), _| *of != number);
        }
    }

    /// It is to end now: of what is watched for the whole time each page is looked at once more. Windows that are not over
    /// count only where there is none.
    pub fn finish(&mut self, now: Duration) {
        if std::mem::replace(&mut self.finishing, true) {
            return;
        }
        let any = self.found.windows() > 0;
        let first_done = |number: u64| self.left.get(&(number, 0)) == Some(&0);
        self.cohorts
            .retain(|number, _| first_done(*number) && (*number == PANEL || !any && *number == 1));
        self.tasks.clear();
        self.left.clear();
        for (number, cohort) in &mut self.cohorts {
            cohort.visits.truncate(1);
            cohort.visits.push(Visit {
                after: now,
                each: EACH,
            });
            for piece in 0..cohort.pieces() {
                self.tasks.insert((now, *number, piece, 1));
            }
            self.left.insert((*number, 1), cohort.pieces());
        }
    }

    /// There is nothing left to be done.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.due().is_none()
    }
}

/// Looks that a page of a sample takes, on average.
fn looks(visits: &[Visit]) -> f64 {
    let each: usize = visits.iter().map(|visit| visit.each).sum();
    each as f64 / EACH as f64
}
