"""``fedmutual doctor``: is this site ready for a run, and if it is not, what is to be done?"""
